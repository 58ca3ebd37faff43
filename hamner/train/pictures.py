"""The pictures of a run are drawn by another process, so that no step waits for them."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

import hamner
from hamner.train.beside import Beside
from hamner.train.metrics import Record

COMMAND = (sys.executable, "-P", "-m", "hamner.plot")
"""what draws the run whose folder follows"""
NICENESS = 19
"""the drawing has what others leave of the CPU"""
LAST_SECONDS = 30.0
"""longest the end of a run waits for its last pictures"""
KILL_SECONDS = 5.0
"""longest it waits for a process that was killed"""


class Pictures:
    """The pictures in a run's folder are drawn anew at every evaluation and save, and at its end.

    One process draws at a time: what is asked for meanwhile is left out, the next time shows it.
    Whatever becomes of it is a warning.

    Args:
        folder: of the run.
        beside: says warnings.
    """

    def __init__(self, folder: Path, beside: Beside) -> None:
        self.folder, self.beside = folder, beside
        self.process: subprocess.Popen | None = None
        self.errors = None
        """the file with what the process said"""

    def report(self, record: Record) -> None:
        """A record with an evaluation is drawn."""
        if record.val_step == record.step:
            self.begin()

    def begin(self) -> None:
        """A process begins to draw, unless one is still at it."""
        with self._guarded():
            if self.process is None or self.process.poll() is not None:
                failure = self._collect()
                self._start()
                if failure:
                    raise failure

    def finish(self) -> None:
        """All records are drawn, or the time for it is over."""
        deadline = monotonic() + LAST_SECONDS
        with self._guarded(then="the run is whole"):
            if self.process is not None:
                self._wait(deadline)
                self._collect()
            self._start()
            self._wait(deadline)
            if failure := self._collect():
                raise failure

    def close(self) -> None:
        """Nothing is drawn any more; the pictures there are whole."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a dead disk
                self.process.wait(KILL_SECONDS)
            self._collect()

    def _guarded(self, then: str = "training goes on") -> contextlib.AbstractContextManager:
        return self.beside("drawing the plots", then=then)

    def _start(self) -> None:
        """A process is started; it shares no terminal, and no signal of one, with this one.

        Raises:
            OSError: it cannot be.
        """
        path = [str(Path(next(iter(hamner.__path__))).parent), os.environ.get("PYTHONPATH", "")]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [*COMMAND, str(self.folder.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            env=os.environ | env,
            start_new_session=True,
        )
        with contextlib.suppress(OSError):  # it may have ended already
            os.setpriority(os.PRIO_PROCESS, self.process.pid, NICENESS)

    def _wait(self, deadline: float) -> None:
        """The process ends by itself, or by force at the deadline.

        Raises:
            TimeoutError: by force.
        """
        try:
            self.process.wait(max(0.0, deadline - monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TimeoutError(f"not done within {LAST_SECONDS:.0f} s") from None

    def _collect(self) -> RuntimeError | None:
        """The process that has ended is forgotten.

        Returns:
            How it failed, if it did.
        """
        if self.process is None:
            return None
        code, errors = self.process.poll(), self.errors
        self.process = self.errors = None
        with errors:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
        reason = said[-1].removeprefix("error: ") if said else f"it ended with code {code}"
        return RuntimeError(reason) if code else None
