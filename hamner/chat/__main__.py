"""`python -m hamner.chat` lets one talk to a run's model in the terminal, or serves it."""

import contextlib
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from hamner.cli import run_command
from hamner.errors import UserError
from hamner.model.sampling import Sampling

if TYPE_CHECKING:
    from hamner.model.generate import Generator

HISTORY_FILE = Path.home() / ".hamner_history"
HELP = """\
/clear          start a new conversation
/system TEXT    set the system prompt; without TEXT, show it; /system off removes it
/temp NUMBER    set the temperature; without NUMBER, show it
/save FILE      append the conversation to FILE, in the form that hamner.sft reads
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""
COMPLETION_HELP = """\
/temp NUMBER    set the temperature; without NUMBER, show it
/save FILE      append the last text to FILE, in the form that --data reads
/quit           leave (also Ctrl-D); Ctrl-C stops the text"""


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model. One that was not fine-tuned on conversations completes text instead."""

    sampling: Sampling = field(default_factory=Sampling)
    checkpoint: Path | None = None
    """a run's folder (its best checkpoint, or else its newest) or one of its checkpoints; default
    the run in runs/ that saved last"""
    system: str = ""
    """system prompt"""
    max_new_tokens: int = 512
    """most tokens of an answer"""
    seq_len: int | None = None
    """tokens of context; default the length the model was trained at"""
    seed: int | None = None
    """of the choice of tokens; default another one every time"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to run"""
    serve: int | None = None
    """instead of the terminal, answer OpenAI's chat-completions protocol on this port of this
    machine (0: any free port)"""
    max_requests: int = 8
    """with --serve, most requests at a time: one is answered, the others wait"""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seq_len", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
        if self.serve is not None and not 0 <= self.serve < 2**16:
            raise UserError(f"--serve {self.serve} is no port: use 0 to 65535")


class Terminal:
    """The terminal is where lines come from and text goes.

    Args:
        read: gives the next line, as `input`; raises EOFError at the end.
        write: takes a piece of text.
    """

    def __init__(self, read: Callable[[str], str], write: Callable[[str], object]) -> None:
        self.read, self.write = read, write

    def say(self, line: str) -> None:
        """The method writes a line that is not the model's."""
        self.write(f"{line}\n")

    def show(self, pieces: Iterator[str]) -> str | None:
        """The method writes a text as it comes; its result says why it ended, or "interrupt"."""
        reason = "interrupt"
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                try:
                    self.write(next(pieces))
                except StopIteration as end:
                    reason = end.value
                    break
        # An interrupted text is left where it is.
        pieces.close()
        self.write("\n")
        return reason


class Session:
    """A session has what is common to chatting and completing: commands and settings.

    Args:
        config: resolved flags.
        generator: the model.
        terminal: to talk through.
    """

    help: str
    prompt: str

    def __init__(self, config: ChatConfig, generator: "Generator", terminal: Terminal) -> None:
        self.config, self.generator, self.terminal = config, generator, terminal
        self.sampling = config.sampling
        self.random = random.Random(config.seed)
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: terminal.say(self.help),
            "temp": self.set_temperature,
            "save": self.save,
        }

    def run(self) -> None:
        """The session reads and answers until /quit or the end of the input."""
        while True:
            try:
                line = self.terminal.read(self.prompt).strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if not line:
                continue
            try:
                if line.startswith("/"):
                    self.command(*line[1:].partition(" ")[::2])
                else:
                    self.answer(line)
            except UserError as error:
                self.terminal.say(f"({error})")

    def command(self, name: str, argument: str) -> None:
        """The method runs a command.

        Raises:
            UserError: there is no such command, or its argument makes no sense.
        """
        if name not in self.commands:
            raise UserError(f"there is no command /{name}; /help lists them")
        self.commands[name](argument.strip())

    def answer(self, text: str) -> None:
        """The session answers what the user wrote."""
        raise NotImplementedError

    def record(self) -> dict:
        """The method gives what /save writes."""
        raise NotImplementedError

    def set_temperature(self, argument: str) -> None:
        """/temp sets or shows the temperature."""
        if argument:
            try:
                temperature = float(argument)
            except ValueError as error:
                raise UserError(f"/temp {argument}: not a number") from error
            self.sampling = dataclasses.replace(self.sampling, temperature=temperature)
        self.terminal.say(f"(temperature {self.sampling.temperature})")

    def save(self, argument: str) -> None:
        """/save appends the record to a file."""
        record = self.record()
        if not argument:
            raise UserError("/save needs the name of a file, such as /save talk.jsonl")
        try:
            with Path(argument).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"/save {argument}: {error.strerror}") from error
        self.terminal.say(f"(appended to {argument})")

    def next_seed(self) -> int:
        """The method gives every text another seed."""
        return self.random.getrandbits(32)


class Chat(Session):
    """A chat is a session in which the model answers."""

    help, prompt = HELP, "you> "

    def __init__(self, config: ChatConfig, generator: "Generator", terminal: Terminal) -> None:
        from hamner.chat.dialogue import Dialogue

        super().__init__(config, generator, terminal)
        self.dialogue = Dialogue(generator, config.system, config.max_new_tokens)
        self.commands |= {"clear": self.clear, "system": self.set_system}

    def answer(self, text: str) -> None:
        forgotten = self.dialogue.forgotten
        pieces = self.dialogue.ask(text, self.sampling, self.next_seed())
        reason = self.terminal.show(pieces)
        if self.dialogue.forgotten > forgotten:
            self.terminal.say(
                f"(the context of {self.generator.context:,} tokens is full: the model no longer "
                f"sees the oldest {self.dialogue.forgotten} messages)"
            )
        if reason == "length":
            self.terminal.say("(cut: no room for more; --max-new-tokens and --seq-len set it)")

    def clear(self, _: str) -> None:
        """/clear starts a new conversation."""
        self.dialogue.clear()
        self.terminal.say("(new conversation)")

    def set_system(self, argument: str) -> None:
        """/system sets or shows the system prompt."""
        if argument:
            self.dialogue.system = "" if argument == "off" else argument
        self.terminal.say(f"(system prompt: {self.dialogue.system or 'none'})")

    def record(self) -> dict:
        if not self.dialogue.turns:
            raise UserError("there is no conversation yet")
        return {"messages": [dataclasses.asdict(message) for message in self.dialogue.messages]}


class Complete(Session):
    """A completion is a session in which the model continues each line for itself."""

    help, prompt = COMPLETION_HELP, "text> "

    def __init__(self, config: ChatConfig, generator: "Generator", terminal: Terminal) -> None:
        super().__init__(config, generator, terminal)
        self.text = ""

    def answer(self, text: str) -> None:
        from hamner.model.generate import Completion

        tokenizer = self.generator.tokenizer
        tokens = tokenizer.encode(text)
        kept = tokens[-(self.generator.context * 3 // 4) :]
        completion = Completion(
            self.generator,
            kept,
            self.sampling,
            max_new_tokens=self.config.max_new_tokens,
            stop_ids={tokenizer.eot_id},
            seed=self.next_seed(),
        )
        self.terminal.write(text)
        self.terminal.show(iter(completion))
        self.text = text + completion.text
        if len(kept) < len(tokens):
            self.terminal.say(
                f"(the context of {self.generator.context:,} tokens is full: the model only saw "
                f"the last {len(kept):,} tokens of the text)"
            )

    def record(self) -> dict:
        if not self.text:
            raise UserError("there is no text yet")
        return {"text": self.text}


def chat(config: ChatConfig, terminal: Terminal) -> None:
    """The function loads the model and talks, or serves it until the process is stopped.

    Raises:
        UserError: there is no such model, or it cannot be run as asked.
    """
    from hamner.checkpoint.saved_model import find_saved_model
    from hamner.model.generate import Generator
    from hamner.parallel.device import select_device

    device = select_device(config.device)
    saved = find_saved_model(config.checkpoint)
    longest = saved.config.model.max_seq_len
    if config.seq_len is not None and config.seq_len > longest:
        raise UserError(f"--seq-len {config.seq_len} is longer than the model's {longest}")
    if config.serve is not None and not saved.is_chat:
        raise UserError(
            f"--serve: {saved.checkpoint.path} was not fine-tuned on conversations, so it has no "
            "chat to serve; fine-tune it with python -m hamner.sft"
        )
    model = saved.build(device)
    generator = Generator(model, saved.tokenizer, config.seq_len or saved.config.seq_len)
    size = f"{saved.config.model.num_parameters():,} parameters"
    terminal.say(f"{saved.checkpoint.path}: {size}, on {device}, context {generator.context:,}")
    if config.serve is not None:
        from hamner.chat.server import ChatServer, serve

        server = ChatServer(
            generator,
            saved.name,
            config.sampling,
            max_new_tokens=config.max_new_tokens,
            max_requests=config.max_requests,
        )
        serve(server, config.serve, terminal.say)
    elif saved.is_chat:
        terminal.say("/help lists the commands")
        Chat(config, generator, terminal).run()
    else:
        terminal.say(
            "this model was not fine-tuned on conversations: it continues what you write; "
            "/help lists the commands"
        )
        Complete(config, generator, terminal).run()


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """The context has arrow keys and a lasting history, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(HISTORY_FILE)
    readline.set_history_length(1_000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(HISTORY_FILE)


def write(text: str) -> None:
    """The function writes to standard output at once."""
    print(text, end="", flush=True)


def parse(args: Sequence[str]) -> ChatConfig:
    """The function reads the command line.

    Raises:
        UserError: values that make no sense.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[ChatConfig],
        args=args,
        prog="python -m hamner.chat",
        config=(tyro.conf.HelptextFromCommentsOff,),
    )


def main(args: Sequence[str]) -> None:
    """The command chats or serves as its flags say."""
    config = parse(args)
    if sys.stdin.isatty() and config.serve is None:
        with line_editing():
            chat(config, Terminal(input, write))
    else:
        # Lines from a pipe: no prompts between the answers.
        chat(config, Terminal(lambda _: input(), write))


if __name__ == "__main__":
    run_command(main)
