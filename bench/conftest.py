"""The suite's flags, the conditions every row is stored with, and the short table at the end."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Flags of `pytest bench/`."""
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


def pytest_configure(config: pytest.Config) -> None:
    """Set the scale before any row is imported; print our table instead of a column per timing."""
    config.addinivalue_line("markers", "quick: part of --quick")
    config.addinivalue_line("markers", "needs_gpu: times a CUDA GPU")
    if config.getoption("--smoke"):
        # Triton reads it when a kernel is decorated.
        os.environ["TRITON_INTERPRET"] = "1"
        from bench import scale

        scale.SMOKE = True
    if config.getoption("verbose") <= 0:
        config.option.benchmark_quiet = True


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """No workers beside this process: they would share what is being measured."""
    return 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what --quick does not want, and what needs a GPU where there is none."""
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


@pytest.fixture(scope="session", autouse=True)
def recordable_stream():
    """Kernels are timed as CUDA graphs."""
    import torch

    from bench.timing import use_recordable_stream

    if torch.cuda.is_available():
        use_recordable_stream()


@pytest.fixture(scope="session")
def conditions(request: pytest.FixtureRequest) -> dict:
    """GPU, power limit, clocks, driver, versions, commit: of every row."""
    from bench.conditions import conditions

    return conditions()


@pytest.fixture(autouse=True)
def described(request: pytest.FixtureRequest, conditions: dict):
    """Store the conditions with every row, and keep the rows for the table at the end."""
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info["conditions"] = conditions
    yield
    if benchmark.stats is not None:
        request.config.stash.setdefault(ROWS, []).append(benchmark.extra_info)


@pytest.fixture(scope="session")
def ceilings():
    """What this GPU reaches at best: a large copy, a large matmul."""
    from bench.ceilings import measure

    return measure()


@pytest.fixture
def vram_budget(request: pytest.FixtureRequest) -> float | None:
    """GiB, or None: what the card has."""
    return request.config.getoption("--vram-budget")


@pytest.fixture
def does_not_fit(request: pytest.FixtureRequest):
    """Report a row that needs more memory than there is, and leave it."""

    def leave(row: str, needs_gib: float | None, available_gib: float):
        need = "more memory than there is" if needs_gib is None else f"{needs_gib:.1f} GiB"
        misfits = request.config.stash.setdefault(MISFITS, [])
        misfits.append({"row": row, "needs_gib": needs_gib, "available_gib": available_gib})
        pytest.skip(f"does not fit {available_gib:.1f} GiB: needs {need}")

    return leave


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """What did not fit belongs to the result."""
    output_json["misfits"] = config.stash.get(MISFITS, [])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The short table, what did not fit, and what could not run here."""
    from bench.report import Results, short_report

    results = Results(config.stash.get(ROWS, []), config.stash.get(MISFITS, []))
    for line in short_report(results):
        terminalreporter.write_line(line)
    left_out = config.stash.get(LEFT_OUT, {})
    if left_out:
        counts = ", ".join(f"{len(items)} of {name}" for name, items in left_out.items())
        terminalreporter.write_line(f"no CUDA GPU here, so these rows did not run: {counts}")
