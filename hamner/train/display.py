"""A run shows a live panel on a terminal, plain lines elsewhere."""

import contextlib
import sys

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hamner.cli import TimelyStream, UnfailingStream, for_terminal
from hamner.plan.words import short
from hamner.progress import ShownStatus
from hamner.train.metrics import Record

FAILURES = (Exception, SystemExit)
"""of a console; it leaves the process when nobody reads its pipe"""


def open_console(kind: type[UnfailingStream] = UnfailingStream) -> Console:
    """The console writes to the standard output, if there is one; what that refuses is lost."""
    return Console(file=sys.stdout and kind(sys.stdout), highlight=False)


class Display:
    """The display shows records as they come, and one-line messages; whatever becomes of the
    terminal, it raises nothing and waits for nobody.

    Args:
        name: of the run, the panel's title.
        total_tokens: length of the run.
        budget_gib: memory the run may take, GiB, or None without a GPU.
    """

    def __init__(self, name: str, total_tokens: int, budget_gib: float | None = None) -> None:
        self.name, self.total_tokens, self.budget_gib = name, total_tokens, budget_gib
        self.live: Live | None = None
        self.panel: Panel | None = None
        """of the newest record"""
        self.connect()

    def connect(self, console: Console | None = None, log: Console | None = None) -> None:
        """The display writes to a console, of which a terminal gets the panel, and plain lines to a
        log as well; None is the terminal, or no log."""
        self.console, self.log = console or open_console(TimelyStream), log
        self.status = ShownStatus(self.console, self.message)
        """of what takes long"""

    def __enter__(self) -> "Display":
        # Warnings of other threads must not wait for a terminal either.
        self.errors = contextlib.redirect_stderr(sys.stderr and TimelyStream(sys.stderr))
        self.errors.__enter__()
        with contextlib.suppress(*FAILURES):
            if self.console.is_terminal:
                self.live = Live(console=self.console, refresh_per_second=4)
                self.live.start()
                self.status = ShownStatus(self.console, self.message, self._update)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(*FAILURES):
            if self.live:
                self.live.stop()
        self.errors.__exit__(None, None, None)
        if isinstance(self.console.file, UnfailingStream):
            self.console.file.give_up_rest()

    def message(self, text: str) -> None:
        """A message is printed above the panel."""
        self._print(self.console, text)
        self._print(self.log, text)

    def messages(self, texts: list[str]) -> None:
        """The display prints the messages and takes them off the list."""
        for text in texts:
            self.message(text)
        texts.clear()

    def show(self, record: Record) -> None:
        """A record replaces the one in the panel, or is a line."""
        fields = self.fields(record)
        line = " | ".join(f"{name} {value}" for name, value in fields.items())
        if self.live is None:
            self.message(line)
            return
        self._print(self.log, line)
        grid = Table.grid(padding=(0, 3), expand=True)
        for _ in range(4):
            grid.add_column(ratio=1)
        cells = [Text.assemble((f"{name} ", "dim"), value) for name, value in fields.items()]
        for start in range(0, len(cells), 4):
            grid.add_row(*cells[start : start + 4])
        body = Table.grid(expand=True)
        body.add_row(grid)
        body.add_row(ProgressBar(total=self.total_tokens, completed=record.tokens))
        self.panel = Panel(body, title=self.name)
        self._update()

    def _update(self) -> None:
        """The terminal shows the panel, and below it what takes long."""
        parts = [self.panel] if self.panel else []
        with contextlib.suppress(*FAILURES):
            self.live.update(Group(*parts, self.status.line))

    def _print(self, console: Console | None, text: str) -> None:
        if console is not None:
            with contextlib.suppress(*FAILURES):
                console.print(Text(for_terminal(text)), soft_wrap=True)

    def fields(self, record: Record) -> dict[str, str]:
        """The fields are the names and values that are shown."""
        fields = {
            "step": f"{record.step:,}",
            "loss": f"{record.loss:.4f}",
            "ppl": f"{record.perplexity:,.1f}",
        }
        if record.val_loss is not None:
            fields["val"] = f"{record.val_loss:.4f} @ {record.val_step:,}"
        fields["lr"] = f"{record.lr:.2e}"
        fields["norm"] = f"{record.grad_norm:.2f}"
        fields["tok/s"] = f"{record.tokens_per_second:,.0f}"
        if record.mfu is not None:
            fields["MFU"] = f"{record.mfu:.1%}"
        if record.peak_vram_gib is not None:
            fields["VRAM"] = f"{record.peak_vram_gib:.1f}/{self.budget_gib:.1f} GiB"
        fields["tokens"] = f"{count(record.tokens)}/{count(self.total_tokens)}"
        if record.tokens_per_second:
            left = (self.total_tokens - record.tokens) / record.tokens_per_second
            fields["left"] = duration(left)
        if record.skipped_steps:
            fields["skipped"] = f"{record.skipped_steps:,}"
        return fields


def duration(seconds: float) -> str:
    """The text has the two largest units: `5 d 18 h`, `3 min 20 s`."""
    units = (("years", 31_557_600), ("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for unit, size in units:
        if left >= size or parts:
            number, left = divmod(left, size)
            parts.append(f"{number:,} {unit}")
    return " ".join(parts[:2]) or "0 s"


def count(number: float) -> str:
    """The text of tokens has always two decimals, so that it does not jump: `10.00B`, `819.20K`."""
    return short(number, ".2f")
