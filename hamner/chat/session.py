"""The module lets a person talk with a model in a terminal: chat or completion, with commands."""

import contextlib
import dataclasses
import json
import os
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hamner.chat.config import ChatConfig
from hamner.chat.context import newest_messages, newest_tokens
from hamner.checkpoint.saved_model import find_saved_model
from hamner.data.chat_template import Message, render_prompt
from hamner.errors import UserError
from hamner.files import expand_home, refuse_unread
from hamner.model.generate import Completion, Generator, answer
from hamner.parallel.device import select_device

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
SHOWN_SYSTEM = 200
"""most characters of a system prompt that the user did not write"""


@dataclass(frozen=True)
class Terminal:
    """The terminal is where lines come from and text goes."""

    read: Callable[[str], str]
    """gives the next line, as `input`; raises EOFError at the end"""
    write: Callable[[str], object]
    """takes a piece of text"""

    def say(self, line: str) -> None:
        """The method writes a line that is not the model's."""
        self.write(f"{line}\n")

    def show(self, completion: Completion) -> None:
        """The method writes a text as it comes; Ctrl-C leaves it where it is."""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in completion:
                self.write(piece)
        self.write("\n")


class Session:
    """A session has what is common to chatting and completing: commands and settings.

    Each kind has its own `help` and `prompt`, `answer`, to what the user wrote, and `record`, which
    gives what /save writes.
    """

    def __init__(self, config: ChatConfig, generator: Generator, terminal: Terminal) -> None:
        self.config, self.generator, self.terminal = config, generator, terminal
        self.sampling = config.sampling
        self.seeds = random.Random(config.seed)
        """gives every text another seed"""
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
            try:
                name, _, argument = line.removeprefix("/").partition(" ")
                if line.startswith("/") and name in self.commands:
                    self.commands[name](argument.strip())
                elif line.startswith("/") and "\n" not in line:
                    raise UserError(f"there is no command /{name}; /help lists them")
                elif line:
                    self.answer(line)
            except UserError as error:
                self.terminal.say(f"({error})")

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
            path = expand_home(argument, "/save")
            refuse_unread(path, "/save")
            line = json.dumps(record, ensure_ascii=False) + "\n"
            with path.open("ab") as file:
                if path.is_file() and not _ends_with_a_line(path):
                    line = "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise UserError(f"/save {argument}: {error.strerror}") from error
        except (RuntimeError, ValueError) as error:  # no such home folder, or a NUL in the name
            raise UserError(f"/save {argument}: there is no such folder") from error
        self.terminal.say(f"(appended to {argument})")


def _ends_with_a_line(path: Path) -> bool:
    """The answer is whether what is appended begins a line: an editor may have left the last one
    without an end."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class Chat(Session):
    """A chat is a session in which the model answers; a full context forgets the oldest turns."""

    help, prompt = HELP, "you> "

    def __init__(self, config: ChatConfig, generator: Generator, terminal: Terminal) -> None:
        super().__init__(config, generator, terminal)
        self.system = config.system or ""
        self.turns: list[Message] = []
        """what user and assistant said, nothing forgotten"""
        self.forgotten = 0
        """how many of the oldest turns the model no longer sees"""
        self.commands |= {"clear": self.clear, "system": self.set_system}

    def answer(self, text: str) -> None:
        """The model answers; what it says is part of the conversation even if it is stopped.

        Raises:
            ContextError: the text alone does not fit; the conversation is as it was.
        """
        question, opening = Message("user", text), self._opening()
        messages = [*opening, *self.turns[self.forgotten :], question]
        seen = newest_messages(messages, self.generator, self.config.max_new_tokens)
        completion = answer(
            self.generator,
            seen,
            self.sampling,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.seeds.getrandbits(32),
        )
        before = self.forgotten
        self.forgotten += len(messages) - len(seen)
        self.turns.append(question)
        try:
            self.terminal.show(completion)
        finally:
            self.turns.append(Message("assistant", completion.text))
        if self.forgotten > before:
            self.terminal.say(
                f"(the context of {self.generator.context:,} tokens is full: the model no longer "
                f"sees the oldest {self.forgotten} messages)"
            )
        if completion.finish_reason == "length":
            self.terminal.say("(cut: no room for more; --max-new-tokens and --seq-len set it)")

    def clear(self, _: str) -> None:
        """/clear starts a new conversation, with the same system prompt."""
        self.turns.clear()
        self.forgotten = 0
        self.terminal.say("(new conversation)")

    def set_system(self, argument: str) -> None:
        """/system sets or shows the system prompt."""
        if argument:
            self.system = "" if argument == "off" else argument
        self.terminal.say(f"(system prompt: {self.system or 'none'})")

    def record(self) -> dict:
        if not self.turns:
            raise UserError("there is no conversation yet")
        messages = [*self._opening(), *self.turns]
        return {"messages": [{"role": m.role, "content": m.content} for m in messages]}

    def _opening(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []


class Complete(Session):
    """A completion is a session in which the model continues each line for itself."""

    help, prompt = COMPLETION_HELP, "text> "
    text = ""
    """the last one"""

    def answer(self, text: str) -> None:
        tokenizer = self.generator.tokenizer
        tokens = tokenizer.encode(text)
        if not tokens:
            raise UserError("the model's tokenizer has no token for anything in this text")
        kept = newest_tokens(tokens, self.generator, self.config.max_new_tokens)
        completion = Completion(
            self.generator,
            kept,
            self.sampling,
            max_new_tokens=self.config.max_new_tokens,
            stop_ids={tokenizer.eot_id},
            seed=self.seeds.getrandbits(32),
        )
        self.terminal.write(text)
        self.terminal.show(completion)
        self.text = text + completion.text
        if len(kept) < len(tokens):
            self.terminal.say(
                f"(the context of {self.generator.context:,} tokens is full, with room for an "
                f"answer: the model only saw the last {len(kept):,} tokens of the text)"
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
    device = select_device(config.device)
    saved = find_saved_model(config.checkpoint)
    if config.system and not saved.is_chat:
        raise UserError(
            f"--system: {saved.checkpoint.path} was not fine-tuned on conversations, so it has no "
            "place for a system prompt: leave the flag out"
        )
    longest = saved.config.model.max_seq_len
    if config.seq_len is not None and config.seq_len > longest:
        raise UserError(f"--seq-len {config.seq_len} is longer than the model's {longest}")
    model = saved.build(device)
    generator = Generator(model, saved.tokenizer, config.seq_len or saved.config.seq_len)
    shortest = len(render_prompt([Message("user", "?")], saved.tokenizer)) if saved.is_chat else 1
    if shortest >= generator.context:
        raise UserError(
            f"--seq-len {generator.context} has no room for a question and an answer: give "
            f"{shortest + 1} or more"
        )
    size = f"{saved.config.model.num_parameters():,} parameters"
    terminal.say(f"{saved.checkpoint.path}: {size}, on {device}, context {generator.context:,}")
    if config.system is None and saved.is_chat and saved.config.sft is not None:
        config = dataclasses.replace(config, system=saved.config.sft.system)
        if config.system:
            shown = textwrap.shorten(config.system, SHOWN_SYSTEM, placeholder=" ...")
            terminal.say(f"system prompt, most used in its data: {shown} (--system sets another)")
    if not saved.is_chat:
        terminal.say("this model was not fine-tuned on conversations: it continues what you write")
    if config.serve is not None:
        # They need packages of the extra `serve`.
        from hamner.chat.server import ChatServer, ServedModel

        ChatServer(ServedModel(generator, saved.name, config, saved.is_chat)).serve(terminal.say)
        return
    terminal.say("/help lists the commands")
    (Chat if saved.is_chat else Complete)(config, generator, terminal).run()
