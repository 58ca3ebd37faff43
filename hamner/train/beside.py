"""What a run does beside training may fail: that is said once, and training goes on.

docs/surviving.md has the table of all that this holds for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Beside:
    """The guard keeps training from what fails beside it.

    Args:
        say: takes the warnings.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.warned: set[str] = set()

    @contextmanager
    def __call__(
        self,
        what: str,
        kinds: type[BaseException] | tuple[()] = BaseException,
        *,
        then: str = "training goes on",
    ) -> Iterator[None]:
        """In this context an error becomes a warning, the first time that `what` fails.

        Args:
            what: is done, as the subject of the warning.
            kinds: of errors that end nothing. A service may call sys.exit, and a tokenizer's panic
                is no Exception either.
            then: what follows of it.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except kinds as error:
            if what not in self.warned:
                self.warned.add(what)
                self.say(f"WARNING: {what} failed: {reason_of(error)}; {then}")


def reason_of(error: BaseException) -> str:
    """The reason is an error's message on one line, or its kind where it has none."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:300] or type(error).__name__
