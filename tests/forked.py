"""`python -m MODULE ARGS` in a process of its own, without the seconds of importing torch.

`run` and `Popen` take the place of those of `subprocess`. The process comes from the fork server of
`tests.kills`, has the standard streams, folder and environment of its own, and runs the module as
the command line does. What is about the start itself (what `--help` imports, a machine that is new
to the command) needs `subprocess`.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import STDOUT, TimeoutExpired

from tests.kills import CONTEXT

STREAMS = ("stdin", "stdout", "stderr")


class Popen:
    """A process that was started; the part of `subprocess.Popen` that the tests use.

    Args:
        command: what would start it, `[sys.executable, "-m", MODULE, *ARGS]`.
        input: all that it can read.
        cwd, env: as in `subprocess`.
        text: whether `communicate` gives strings.
        stdout, stderr: files to append to, or STDOUT for both in one; else it is kept for
            `communicate`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        input: str | None = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        text: bool = False,
        stdout=None,
        stderr=None,
        **_,
    ) -> None:
        python, flag, module, *args = command
        assert (python, flag) == (sys.executable, "-m"), command
        self.args, self.text = command, text
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in STREAMS]
        for file, content in zip(self.files, (input or "", "", ""), strict=True):
            file.write_text(content)
        for number, given in ((1, stdout), (2, stderr)):
            if hasattr(given, "name"):
                self.files[number] = Path(given.name)
        if stderr is STDOUT:
            self.files[2] = self.files[1]
        environment = dict(os.environ if env is None else env)
        where = str(cwd or Path.cwd())
        self.process = CONTEXT.Process(
            target=_run, args=(module, args, self.files, where, environment)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], object], seconds: float = 90) -> None:
        """Return once `condition` holds, which it must before the process ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, self.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def communicate(self, timeout: float | None = None) -> tuple:
        """What it printed on either stream, once it has ended."""
        self.wait(timeout)
        read = Path.read_text if self.text else Path.read_bytes
        return tuple(map(read, self.files[1:]))


def run(command: Sequence[str], *, timeout: float = 120, **how) -> subprocess.CompletedProcess:
    """Run it to the end; killed after `timeout` seconds."""
    how.pop("capture_output", None)
    process = Popen(command, **how)
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
        process.process.join()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_module(module: str, *args: object, **how) -> subprocess.CompletedProcess:
    """Run `python -m MODULE ARGS` to the end; what it prints is text."""
    return run([sys.executable, "-m", module, *map(str, args)], text=True, **how)


def _run(module: str, args: list[str], files: list[Path], cwd: str, env: dict[str, str]) -> None:
    """Body of the process."""
    for number, file in enumerate(files):
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
