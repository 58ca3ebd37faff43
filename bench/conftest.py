"""The suite has flags, compiles before its rows, stores every row with its conditions, and prints a
short table at the end."""

import contextlib
import json
import os
import time
from pathlib import Path

import pytest

from bench import compile_ahead

SLOWEST = 10
"""rows whose seconds are printed"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The hook adds the flags of `pytest bench/`."""
    group = parser.getgroup("hamner benchmarks")
    group.addoption(
        "--quick", action="store_true", help="only the rows that matter most: under 2 minutes"
    )
    group.addoption(
        "--vram-budget",
        type=float,
        metavar="GIB",
        help="memory a trainer may take; default the card's (24 imitates an RTX 3090)",
    )
    group.addoption(
        "--smoke",
        action="store_true",
        help="every row at a minute size on the CPU, to test the suite; times mean nothing",
    )
    group.addoption(
        "--rows",
        type=Path,
        metavar="FILE",
        help="write each row when it is finished, a JSON object a line, for bench.report",
    )
    group.addoption(
        "--compile-only",
        type=Path,
        metavar="DIR",
        help="time nothing: used by the suite itself for what it compiles ahead, with others who "
        "share DIR",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The hook sets the scale before any row is imported, and prints our table instead of a column
    per timing."""
    config.addinivalue_line("markers", "quick: part of --quick")
    config.addinivalue_line("markers", "needs_gpu: times a CUDA GPU")
    if config.getoption("--smoke"):
        # Triton reads it when a kernel is decorated.
        os.environ["TRITON_INTERPRET"] = "1"
        from bench import scale

        scale.SMOKE = True
    if folder := config.getoption("--compile-only"):
        from bench import scale

        scale.COMPILE_ONLY = True
        config.stash[CLAIMS] = compile_ahead.Claims(folder)
    if config.getoption("verbose") <= 0:
        config.option.benchmark_quiet = True
    config.stash[STARTED] = time.perf_counter()
    if rows := config.getoption("--rows"):
        try:
            rows.write_text("", encoding="utf-8")
        except OSError as error:
            raise pytest.UsageError(f"--rows {rows} cannot be written: {error.strerror}") from error


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The hook wants no workers beside this process: they would share what is being measured."""
    return 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The hook leaves out what --quick does not want, and what needs a GPU where there is none."""
    import torch

    has_gpu = torch.cuda.is_available() or config.getoption("--smoke")
    kept, dropped = [], []
    for item in items:
        is_wanted = not config.getoption("--quick") or item.get_closest_marker("quick")
        can_run = has_gpu or not item.get_closest_marker("needs_gpu")
        (kept if is_wanted and can_run else dropped).append(item)
        if is_wanted and not can_run:
            config.stash.setdefault(LEFT_OUT, {}).setdefault(item.path.stem, []).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


LEFT_OUT = pytest.StashKey[dict[str, list[pytest.Item]]]()
ROWS = pytest.StashKey[list[dict]]()
MISFITS = pytest.StashKey[list[dict]]()
CLAIMS = pytest.StashKey[compile_ahead.Claims]()
COMPILED = pytest.StashKey[dict]()
STARTED = pytest.StashKey[float]()
SECONDS = pytest.StashKey[dict[str, float]]()
BENCHMARK = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """On a GPU, the hook compiles what the rows need before the first of them."""
    import torch

    config = session.config
    is_timed = not (config.getoption("--smoke") or CLAIMS in config.stash)
    if session.testsfailed or config.option.collectonly or not is_timed:
        return
    if not torch.cuda.is_available():
        return
    budget = config.getoption("--vram-budget")
    flags = [] if budget is None else ["--vram-budget", str(budget)]
    compile_ahead.use_one_cache()
    compiled = compile_ahead.run(session.items, flags, lambda: prepare(session.items))
    if compiled:
        config.stash[COMPILED] = compiled
        keep(config, {"compile_ahead": compiled})


def prepare(items: list[pytest.Item]) -> None:
    """The function prepares what trainers are compared with, which is not timed."""
    from bench import steps

    trainers = (item for item in items if "trainer" in getattr(item, "fixturenames", ()))
    # Where the compilers leave too little memory, rows make their own.
    with contextlib.suppress(RuntimeError):
        for item in trainers:
            item.module.reference_of(item.callspec.params["option"])
    steps.free_memory()


def keep(config: pytest.Config, line: dict) -> None:
    """The function appends to the file of --rows, which a suite that does not end leaves behind."""
    if path := config.getoption("--rows"):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """The hook measures how long a row takes in all, and keeps it."""
    started = time.perf_counter()
    result = yield
    config, seconds = item.config, time.perf_counter() - started
    config.stash.setdefault(SECONDS, {})[item.nodeid] = seconds
    benchmark = item.stash.get(BENCHMARK, None)
    if benchmark is not None and benchmark.stats is not None:
        benchmark.extra_info["row_seconds"] = round(seconds, 2)
        config.stash.setdefault(ROWS, []).append(benchmark.extra_info)
        keep(config, {"fullname": item.nodeid, "extra_info": benchmark.extra_info})
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Of what is only compiled, the hook leaves to other processes what they have taken."""
    claims = item.config.stash.get(CLAIMS, None)
    if claims is None:
        return
    group = compile_ahead.group_of(item)
    if group is None or not claims.take(group):
        pytest.skip("compiles nothing, or another process does it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """The hook tells the suite which row could not be compiled ahead."""
    report = yield
    claims = item.config.stash.get(CLAIMS, None)
    if claims is not None and report.failed:
        claims.fail(item.nodeid, call.excinfo.exconly())
    return report


@pytest.fixture(scope="session", autouse=True)
def recordable_stream():
    """Kernels are timed as CUDA graphs, which this stream can record."""
    import torch

    from bench.timing import use_recordable_stream

    if torch.cuda.is_available():
        use_recordable_stream()


@pytest.fixture(autouse=True)
def no_lines_of_earlier_rows():
    """A row reads nothing from the L2 that another has put there."""
    from bench.timing import reset_persisting_l2

    reset_persisting_l2()


@pytest.fixture
def keep_graphs():
    """The fixture is for rows that differentiate one graph many times, which compiled graphs
    otherwise refuse, and compile a graph a shape, of which there are more than torch expects."""
    import torch._dynamo.config
    import torch._functorch.config

    with (
        torch._functorch.config.patch(donated_buffer=False),
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        yield


@pytest.fixture(scope="session")
def conditions(request: pytest.FixtureRequest) -> dict:
    """The fixture gives GPU, power limit, clocks, driver, versions and commit of every row that is
    timed."""
    from bench.conditions import conditions

    return {} if CLAIMS in request.config.stash else conditions()


@pytest.fixture(autouse=True)
def described(request: pytest.FixtureRequest, conditions: dict):
    """The fixture stores the conditions with every row."""
    from bench import steps

    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info["conditions"] = conditions
    request.node.stash[BENCHMARK] = benchmark
    yield
    if CLAIMS in request.config.stash:
        steps.free_memory()  # others need it


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest):
    """The fixture gives what this GPU reaches at best: a large copy, a large matmul. None if
    nothing is timed."""
    from bench.ceilings import measure

    return None if CLAIMS in request.config.stash else measure()


@pytest.fixture
def vram_budget(request: pytest.FixtureRequest) -> float | None:
    """The fixture gives GiB, or None: what the card has."""
    return request.config.getoption("--vram-budget")


@pytest.fixture
def does_not_fit(request: pytest.FixtureRequest):
    """The fixture reports a row that needs more memory than there is, and leaves it."""

    def leave(row: str, needs_gib: float | None, available_gib: float):
        need = "more memory than there is" if needs_gib is None else f"{needs_gib:.1f} GiB"
        misfits = request.config.stash.setdefault(MISFITS, [])
        misfit = {"row": row, "needs_gib": needs_gib, "available_gib": available_gib}
        misfits.append(misfit)
        keep(request.config, {"misfit": misfit})
        pytest.skip(f"does not fit {available_gib:.1f} GiB: needs {need}")

    return leave


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """What did not fit belongs to the result, and so does what was compiled before it."""
    output_json["misfits"] = config.stash.get(MISFITS, [])
    output_json["compile_ahead"] = config.stash.get(COMPILED, None)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The hook prints the short table, what did not fit, and what could not run here."""
    from bench.report import Results, short_report

    if CLAIMS in config.stash:
        return
    results = Results(
        config.stash.get(ROWS, []), config.stash.get(MISFITS, []), config.stash.get(COMPILED, None)
    )
    for line in short_report(results):
        terminalreporter.write_line(line)
    left_out = config.stash.get(LEFT_OUT, {})
    if left_out:
        counts = ", ".join(f"{len(items)} of {name}" for name, items in left_out.items())
        terminalreporter.write_line(f"no CUDA GPU here, so these rows did not run: {counts}")
    seconds = config.stash.get(SECONDS, {})
    for line in where_time_went(seconds, time.perf_counter() - config.stash[STARTED]):
        terminalreporter.write_line(line)


def where_time_went(rows: dict[str, float], total: float) -> list[str]:
    """The function gives the seconds of the suite, of its files and of its slowest rows (their
    building, checking and compiling included), by node id."""
    files: dict[str, float] = {}
    for row, seconds in rows.items():
        file = Path(row.partition("::")[0]).stem.removeprefix("test_")
        files[file] = files.get(file, 0.0) + seconds
    slowest = sorted(rows.items(), key=lambda item: -item[1])[:SLOWEST]

    def listed(items) -> str:
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in items)

    return [
        f"the suite took {total:.0f} s, of them by file: {listed(files.items())}",
        f"slowest rows, s: {listed((row.rpartition('::')[2], s) for row, s in slowest)}",
    ]
