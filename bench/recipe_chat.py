"""What a person gets of a pre-trained model: it is fine-tuned on conversations, and both talk.

The same conversations are learned with several learning rates and lengths, and the run with the
least loss of held-out ones answers questions of which every answer, the first that was drawn, is
shown. Its base model continues beginnings of texts beside it, and a question too.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.conditions import conditions, in_words
from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.sft import SftConfig
from hamner.data.chat_template import Message
from hamner.errors import UserError
from hamner.files import read_records, write_whole
from hamner.model.generate import Generator, answer, generate
from hamner.model.sampling import Sampling
from hamner.parallel.device import select_device
from hamner.sft import __main__ as sft
from hamner.sft.fine_tuning import fine_tune

TRIALS = ((1e-5, 3), (1e-4, 3), (3e-4, 3), (1e-4, 6))
"""peak learning rate, the first that of hamner.sft, and epochs of each fine-tuning run"""
QUESTIONS = (
    "Hey!",
    "Who are you?",
    "What is the capital of France?",
    "What is 7 + 5?",
    "Why is the sky blue?",
    "Tell me a short story about a lighthouse.",
    "What should I cook tonight?",
    "Explain what a GPU does.",
)
BEGINNINGS = (
    "Who are you?",
    "The capital of France is",
    "The sky is blue because",
    "Once upon a time there was a lighthouse",
    "A graphics processor is",
)
LONGEST = 120
"""tokens of an answer"""
SEED = 0
"""of the choice of tokens"""


@dataclass(frozen=True)
class Talk:
    """Fine-tune the better model of the long pair on conversations, and let both talk."""

    output: Path = Path("runs/recipes")
    """folder in which `long` was run"""
    data: tuple[str, ...] = ("builtin",)
    """conversations to learn, as for hamner.sft"""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning run has ended."""

    folder: Path
    config: SftConfig
    steps: int
    loss: float
    """the least of the held-out conversations, nats a token of their answers"""


def talk(base: Path, settings: Talk, extra: Sequence[str]) -> str:
    """The function fine-tunes a model and has it and its base talk.

    Args:
        base: run of the model.
        settings: where and on what; in its output come the runs and `chat.md`.
        extra: flags of hamner.sft for every run.

    Returns:
        What is in `chat.md`: Markdown.

    Raises:
        UserError: flags or data do not allow it, or a run was left before its end.
    """
    runs = []
    for lr, epochs in TRIALS:
        run = settings.output / "runs" / f"sft-lr{lr:g}-{epochs}-epochs"
        own = {"checkpoint": base, "run-dir": run, "lr": lr, "epochs": epochs}
        flags = [text for name, value in own.items() for text in (f"--{name}", str(value))]
        runs.append(tune(sft.parse(["--data", *settings.data, *flags, *extra])))
    best = min(runs, key=lambda run: run.loss)
    text = "\n".join([*table(runs), "", *conversations(base, best.folder)])
    write_whole(settings.output / "chat.md", f"{text}\n")
    return text


def tune(config: SftConfig) -> Tuned:
    """The function fine-tunes, in place of an earlier run.

    Raises:
        UserError: flags or data do not allow it, or it was left before its end.
    """
    folder = config.run_dir
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_name(f"{folder.name}.txt")
    with log.open("w") as said, contextlib.redirect_stdout(said):
        outcome = fine_tune(config)
    losses = [record["val_loss"] for record in read_records(RunFolder(folder).metrics)]
    losses = [loss for loss in losses if loss is not None]
    if outcome.exit_code or not losses:
        raise UserError(f"{folder.name} did not come to its end: see {log}, then start again")
    return Tuned(folder, config, outcome.step, min(losses))


def table(runs: Sequence[Tuned]) -> list[str]:
    """The function gives the fine-tuning runs as lines of Markdown."""
    rows = [
        f"| {run.config.lr:g} | {run.config.sft.epochs:g} | {run.steps} | {run.loss:.3f} |"
        for run in runs
    ]
    head = ["| peak lr | epochs | steps | loss of held-out answers, nats |", "|---|---|---|---|"]
    return [in_words(conditions()), "", *head, *rows]


def conversations(base: Path, tuned: Path) -> list[str]:
    """The function lets a base model and its fine-tuned one talk, in lines of Markdown."""
    lines = ["The fine-tuned model:"]
    reply = talker(tuned)
    for question in QUESTIONS:
        lines += ["", f"> **{question}**", ">", *quoted(reply(question))]
    lines += ["", "Its base model goes on from what is bold:"]
    reply = talker(base)
    for beginning in BEGINNINGS:
        lines += ["", *quoted(f"**{beginning}**{reply(beginning)}")]
    return lines


def talker(run: Path) -> Callable[[str], str]:
    """The function loads the model of a run. The result gives its answer to a question, or of a
    base model what follows a text."""
    saved = find_saved_model(run)
    model = saved.build(select_device("auto"))
    settings = {"max_new_tokens": LONGEST, "sampling": Sampling(), "seed": SEED}
    if not saved.is_chat:
        return lambda text: generate(model, saved.tokenizer, text, **settings)
    generator = Generator(model, saved.tokenizer, saved.config.seq_len)
    system = [Message("system", saved.config.sft.system)] if saved.config.sft.system else []

    def reply(text: str) -> str:
        messages = [*system, Message("user", text)]
        return answer(generator, messages, **settings).run().strip()

    return reply


def quoted(text: str) -> list[str]:
    """The function gives a text as a quotation in Markdown."""
    return [f"> {line}".rstrip() for line in text.splitlines()]
