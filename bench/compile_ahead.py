"""What the rows launch is compiled, in several processes at once, before the first row is timed.

On a fresh machine nearly all of a row's time is compilation, one kernel after the other. So rows
that compile are first run once each, untimed, by a pool of processes (`pytest --compile-only`),
which leave what they compiled in the caches of Triton and torch.compile on disk. A row then loads
from there what it needs; `build_seconds` and `warm_up_seconds` hold what that still takes.

The pool works through groups of rows, those that share compiled code: a free process takes the
next one, the longest first. What a process would measure beside the others must not stay: which
configuration of a compiled kernel is the fastest, and which attention. Each row finds that out
itself, on a GPU of its own.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hamner.config.train import TrainConfig

NOTHING_TO_COMPILE = frozenset(
    {"eager", "torch", "torch fused", "loop", "grouped_mm", "cuBLAS bf16"}
    | {"sdpa-flash", "sdpa-cudnn", "flash-attn", "Hugging Face"}
)
"""implementations and trainers that come compiled"""
SHARED = frozenset({"direction", "policy", "micro_batches", "stage"})
"""parameters between whose values most of the compiled code is the same"""
LONGEST_FIRST = ("compiled", "compiled, memory budget 0.5", "compiled, memory budget 0.3")
"""trainers: a whole model takes a minute"""
LAYERS = 3
"""of a model that is not compiled as a whole: a first, a middle and a last one"""
CORES_A_PROCESS = 1.5
MOST_PROCESSES = 10
"""one holds 26 GiB on an H100 for option a's whole model, the others 1 to 10"""
WORTH_IT = 8
"""groups: a process takes some 10 s to start"""
MOST_SECONDS = 300
MOST_CHARACTERS = 200
"""of a reason"""

Group = tuple[str, ...]


def group_of(item: pytest.Item) -> Group | None:
    """The function gives what a row compiles in common with others; None of a row that compiles
    nothing."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if item.get_closest_marker("needs_gpu") is None:
        return None
    if not NOTHING_TO_COMPILE.isdisjoint(map(str, parameters.values())):
        return None
    named = [f"{name}={value}" for name, value in parameters.items() if name not in SHARED]
    return (item.path.stem, item.originalname, *named)


def groups_of(items: Iterable[pytest.Item]) -> dict[Group, list[pytest.Item]]:
    """The function gives rows that compile, by what they share: trainers before kernels, the
    longest first."""
    groups: dict[Group, list[pytest.Item]] = {}
    for item in items:
        if (group := group_of(item)) is not None:
            groups.setdefault(group, []).append(item)

    def order(group: Group) -> int:
        parameters = groups[group][0].callspec.params
        if (trainer := parameters.get("trainer")) in LONGEST_FIRST:
            return LONGEST_FIRST.index(trainer)
        return len(LONGEST_FIRST) + ("option" not in parameters)

    return {group: groups[group] for group in sorted(groups, key=order)}


def few_layers(config: TrainConfig) -> TrainConfig:
    """The function gives the run with a model whose layers compile the same code as those of all of
    it."""
    model = replace(config.model, num_layers=min(LAYERS, config.model.num_layers))
    return replace(config, model=model)


class Claims:
    """The claims say which process takes which group: the first to make a file in a folder has
    it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[Group, bool] = {}

    def take(self, group: Group) -> bool:
        """The method says whether the group is this process's; asked again, the answer is the
        same."""
        if group not in self.answers:
            name = hashlib.sha256(repr(group).encode()).hexdigest()
            try:
                (self.folder / f"{name}.taken").touch(exist_ok=False)
            except FileExistsError:
                self.answers[group] = False
            else:
                self.answers[group] = True
        return self.answers[group]

    def fail(self, row: str, why: str) -> None:
        """The method notes a row that could not be run."""
        with (self.folder / "failed").open("a", encoding="utf-8") as file:
            file.write(f"{row}: {' '.join(why.split())[:MOST_CHARACTERS]}\n")

    def failed(self) -> list[str]:
        """The method gives rows of all processes that could not be run, and why."""
        file = self.folder / "failed"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def use_one_cache() -> None:
    """The function lets our kernels and torch.compile's share Triton's cache.

    torch.compile names a folder of its own in the environment when it first meets a kernel, and
    from then on Triton would look for ours there too.
    """
    import triton

    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)


def run(items: Sequence[pytest.Item], flags: Sequence[str], meanwhile: Callable[[], None]) -> dict:
    """The function compiles what the rows need.

    Args:
        items: the rows that will be timed.
        flags: of the suite, as far as they change what is compiled.
        meanwhile: what this process does until the others are through.

    Returns:
        How many kernels and graphs were compiled for how many rows, in how many seconds and
        processes, and the rows that failed; empty where it is not worth it.
    """
    groups = groups_of(items)
    if len(groups) < WORTH_IT:
        return {}
    cores = len(os.sched_getaffinity(0))
    count = max(1, min(int(cores / CORES_A_PROCESS), MOST_PROCESSES))
    rows = [item.nodeid for group in groups.values() for item in group]
    before, choices, started = compiled_files(), timed_choices(), time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            *(sys.executable, "-m", "pytest", *rows, *flags, "--compile-only", name),
            *("--benchmark-disable", "--no-header", "-q", "-p", "no:cacheprovider"),
        ]
        environment = os.environ | {
            # A trainer remembers there which attention it found the fastest.
            "XDG_CACHE_HOME": name,
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // 4)),
        }
        root = items[0].config.rootpath
        with pool(command, count, folder, cwd=root, env=environment) as processes:
            meanwhile()
            # What is not compiled by then, a row compiles.
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(timeout=max(1.0, started + MOST_SECONDS - time.time()))
        failed = Claims(folder).failed()
        failed += [
            f"process {number}: exit code {process.returncode}, {last_line(log_of(folder, number))}"
            for number, process in enumerate(processes)
            if process.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        ]
    for file, _ in timed_choices() - choices:
        file.unlink()
    kernels, graphs = (len(new - old) for new, old in zip(compiled_files(), before, strict=True))
    return {
        "kernels": kernels,
        "graphs": graphs,
        "rows": len(rows),
        "seconds": round(time.time() - started, 1),
        "processes": count,
        "failed": failed,
    }


@contextlib.contextmanager
def pool(
    command: Sequence[str], count: int, folder: Path, **how
) -> Iterator[list[subprocess.Popen]]:
    """While it is open, so many processes run; what they say is in files of `folder`."""
    processes = []
    try:
        for number in range(count):
            with log_of(folder, number).open("wb") as log:
                how |= {"stdout": log, "stderr": subprocess.STDOUT}
                processes.append(subprocess.Popen(command, **how))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log_of(folder: Path, number: int) -> Path:
    """The function gives what a process of the pool said."""
    return folder / f"{number}.log"


def last_line(log: Path) -> str:
    """The function gives the end of what a process said."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "nothing said")


def compiled_files() -> tuple[set[Path], set[Path]]:
    """The function gives Triton's kernels and torch.compile's graphs (a forward or a backward each)
    on disk."""
    graphs = inductor_cache() / "fxgraph"
    return (
        set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")),
        {path for path in graphs.glob("*/*") if path.is_dir()},
    )


def timed_choices() -> set[tuple[Path, int]]:
    """The function gives where torch.compile keeps which configuration of a kernel it found the
    fastest, and since when."""
    files = inductor_cache().rglob("*.best_config")
    return {(file, file.stat().st_mtime_ns) for file in files}


def inductor_cache() -> Path:
    """The function gives torch.compile's folder."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def describe(compiled: dict) -> str:
    """The function makes the sentence for the suite's end and the report."""
    line = (
        f"compiled ahead: {compiled['kernels']} kernels and {compiled['graphs']} graphs of "
        f"{compiled['rows']} rows in {compiled['seconds']:.0f} s on {compiled['processes']} "
        "processes"
    )
    if compiled["failed"]:
        line += f"; {len(compiled['failed'])} failed there: {', '.join(compiled['failed'])}"
    return line
