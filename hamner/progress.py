"""While people wait, they see what is being done and how far it is.

On a terminal that is one line that changes, elsewhere a line from time to time. The work itself
only counts; a thread beside it looks at the count.
"""

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from time import monotonic

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

from hamner.cli import UnfailingStream

QUIET_SECONDS = 10.0
"""between two plain lines that say how far something is"""
REFRESHES_PER_SECOND = 4


class Task:
    """A task is work under way, which counts what it has done.

    Args:
        what: is being done.
        total: units there are to do, None where nobody knows.
        unit: what is counted, such as rows. Bytes are shown as such; "" counts nothing.

    Attributes:
        done: units so far.
        note: shown behind the count.
    """

    def __init__(self, what: str, total: float | None = None, unit: str = "") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done: float = 0
        self.note = ""
        self._began = monotonic()

    def advance(self, amount: float = 1) -> None:
        """So many more units are done."""
        self.done += amount

    def how_far(self) -> str:
        """The text says how much is done of all, or how fast where that is unknown."""
        seconds = monotonic() - self._began
        count = [self._count(seconds)] if self.unit else []
        note = [self.note] if self.note else []
        return ", ".join([*count, *note, f"{seconds:.0f} s"])

    def _count(self, seconds: float) -> str:
        if self.total is not None:
            return f"{self._amount(self.done)} of {self._amount(self.total, named=True)} " + (
                f"({min(1.0, self.done / max(1, self.total)):.0%})"
            )
        count = self._amount(self.done, named=True)
        if seconds < 1:
            return count
        return f"{count}, {self._amount(self.done / seconds, named=True)}/s"

    def _amount(self, number: float, *, named: bool = False) -> str:
        if self.unit == "bytes":
            return decimal(int(number))
        return f"{number:,.0f} {self.unit}" if named else f"{number:,.0f}"


class Status:
    """A status has the tasks under way, one inside another. This one shows them to nobody."""

    @contextlib.contextmanager
    def task(self, what: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """In this context a task is under way; see `Task`."""
        yield Task(what, total, unit)


SILENT = Status()


class ShownStatus(Status):
    """The innermost of the tasks under way is shown.

    Args:
        console: a terminal has a line that changes.
        say: prints a line anywhere else.
        draw: called when the terminal, which shows `line` among other things, is to be drawn
            anew; None shows it by itself.
    """

    def __init__(
        self,
        console: Console,
        say: Callable[[str], None],
        draw: Callable[[], None] | None = None,
    ) -> None:
        self.line = TaskLine(console)
        self._say, self._draw = say, draw

    @contextlib.contextmanager
    def task(self, what: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        tasks = self.line.under_way
        shown = contextlib.nullcontext() if tasks else self._shown()
        task = Task(what, total, unit)
        tasks.append(task)
        with shown:
            try:
                yield task
            finally:
                tasks.remove(task)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """In this context people see the line."""
        console = self.line.console
        if not console.is_terminal or console.is_dumb_terminal:
            with self._said():
                yield
        elif self._draw is None:
            with self.line:
                yield
        else:
            self._draw()
            yield

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        ended = threading.Event()

        def say_now_and_then() -> None:
            while not ended.wait(QUIET_SECONDS):
                for task in self.line.under_way[-1:]:
                    self._say(f"{task.what}: {task.how_far()}")

        thread = threading.Thread(target=say_now_and_then, name="hamner-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class TaskLine(Progress):
    """The line shows the last of the tasks under way.

    Args:
        console: to show it on.
    """

    def __init__(self, console: Console) -> None:
        self.under_way: list[Task] = []
        what = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=what),
            TextColumn("{task.fields[how_far]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
            # What goes to a file must not come out on the terminal.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
            expand=True,
        )
        self._shown_task = self.add_task("")

    def get_renderables(self) -> Iterable[RenderableType]:
        """The line is drawn from what the last task has counted."""
        for task in self.under_way[-1:]:
            self.update(
                self._shown_task,
                description=task.what,
                total=task.total,
                completed=task.done,
                how_far=task.how_far(),
            )
            yield from super().get_renderables()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Status]:
    """While people wait in this context, they see what is being done, on the standard error.

    What is over soon, or refused, leaves nothing there. Of several processes, the first one speaks.

    Yields:
        What shows the tasks that this work consists of.
    """
    speaks = sys.stderr is not None and os.environ.get("RANK", "0") == "0"
    file = UnfailingStream(sys.stderr) if speaks else io.StringIO()
    console = Console(file=file, highlight=False)

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    status = ShownStatus(console, say)
    with status.task(what):
        yield status
