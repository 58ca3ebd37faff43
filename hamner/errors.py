"""The module has the one exception for bad input, and the exit codes of every command."""

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_BAD_STEPS = 3
EXIT_INTERRUPTED = 130

#: Of a sentence, from its beginning and from its end, which says the mend.
HEAD, TAIL = 700, 300


class UserError(Exception):
    """The exception is bad input: one clear sentence naming the flag or file and the mend.

    Commands print it without a traceback and exit with code 2 (`hamner.cli.run_command`).
    """

    def __str__(self) -> str:
        """The sentence stands on one line, and is short even if it quotes what a file holds."""
        text = self._line
        return f"{text[:HEAD]} ... {text[-TAIL:]}" if self.is_shortened else text

    @property
    def is_shortened(self) -> bool:
        """The value says whether the middle of the sentence is left out."""
        return len(self._line) > HEAD + TAIL

    @property
    def _line(self) -> str:
        return " ".join(super().__str__().splitlines())
