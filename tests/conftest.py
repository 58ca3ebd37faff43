"""Runs the kernels where they can run: compiled on a GPU, in Triton's interpreter elsewhere."""

import contextlib
import gc
import importlib.util
import os
import signal
from pathlib import Path

# Each worker and each process a test starts gets one thread: more would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from hamner.train import pictures

# Triton reads the variable when a kernel is decorated, so it must be set before any is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import adapt

    adapt()


NEEDS = {
    "chat/test_browser.py": "uvicorn",
    "chat/test_guard.py": "uvicorn",
    "chat/test_main.py": "uvicorn",
    "chat/test_page.py": "uvicorn",
    "chat/test_server.py": "openai",
    "evaluate/test_harness.py": "lm_eval",
    "export/test_export.py": "gguf",
    "export/test_card.py": "transformers",
    "export/test_llama_cpp.py": "gguf",
    "export/test_tokenizer.py": "gguf",
    "model/test_rotary.py": "gguf",
    "test_architecture.py": "grimp",
    "test_chatbot_path.py": "gguf",
    "test_documents.py": "gguf",
}
"""packages of hamner[test] that a machine with a GPU may lack, by the file that imports them; none
of the files has a test that needs a GPU"""
collect_ignore = [
    file
    for file, package in NEEDS.items()
    if torch.cuda.is_available() and importlib.util.find_spec(package) is None
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the kernels of an older GPU need to run on a newer one."""
    parser.addoption(
        "--as-capability",
        metavar="8.6",
        help="execute the code and the launch tables of this older capability on the GPU at hand, "
        "and fail if a configuration of the tables is not executed by any test of all kernels",
    )


EXECUTED = pytest.StashKey()
EXECUTIONS = "executed"
"""the property of a test that lists them"""


def pytest_configure(config: pytest.Config) -> None:
    """Become the older GPU, in each process, before a test module is imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in what a script starts in the background; the tests, and processes of theirs, ask
        # others to end by it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if (capability := config.getoption("as_capability")) is None:
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError(
            "--as-capability executes kernels on a GPU, and no CUDA GPU was found"
        )
    from bench.as_capability import as_capability
    from hamner.errors import UserError
    from tests.kernels.executed import Executed

    stack = contextlib.ExitStack()
    try:
        config.stash[EXECUTED] = Executed(stack.enter_context(as_capability(capability)))
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    config.add_cleanup(stack.close)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Let the test's report list what it was the first to execute."""
    executed = item.config.stash.get(EXECUTED, None)
    if executed is not None and call.when == "call":
        item.user_properties.append((EXECUTIONS, executed.since_last_call()))


def executed_configurations(config: pytest.Config) -> tuple[list[str], list[str]]:
    """What tests that passed executed of the launch tables, a line each, and what none did."""
    from tests.kernels.executed import report

    reports = config.pluginmanager.getplugin("terminalreporter").getreports("passed")
    properties = ((test.nodeid, dict(test.user_properties)) for test in reports)
    return report(
        config.getoption("as_capability"),
        ((test, found[EXECUTIONS]) for test, found in properties if EXECUTIONS in found),
    )


def runs_all_kernel_tests(config: pytest.Config) -> bool:
    """Whether no file and no name was chosen, so that every configuration should be executed."""
    tests = Path(__file__).parent
    chosen = {config.invocation_params.dir.joinpath(name).resolve() for name in config.args}
    return not config.option.keyword and bool(chosen & {tests, tests / "kernels"})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if a configuration of the older GPU's launch tables was never executed."""
    config = session.config
    is_worker = hasattr(config, "workerinput")
    if EXECUTED in config.stash and not is_worker and runs_all_kernel_tests(config):
        _, missing = executed_configurations(config)
        if missing and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_report_header() -> list[str]:
    """Say which files are left out."""
    return [f"left out: {file}, {NEEDS[file]} is not installed" for file in collect_ignore]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers; six on a GPU, most of whose time goes into compiling kernels on the CPU.

    Tests that need most of the GPU's memory share one of them (`xdist_group`).
    """
    return 6 if torch.cuda.is_available() else 2


@pytest.fixture(autouse=torch.cuda.is_available())
def leave_memory_to_other_workers():
    """Give GPU memory back after each test, that of objects in reference cycles too."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch) -> tuple[str, ...]:
    """Trainings draw nothing unless a test is about that: it takes a process of a second.

    Returns:
        The command that does.
    """
    command = pictures.COMMAND
    monkeypatch.setattr(pictures, "COMMAND", ("true",))
    return command


@pytest.fixture
def with_pictures(monkeypatch, without_pictures) -> None:
    """Trainings draw their pictures."""
    monkeypatch.setattr(pictures, "COMMAND", without_pictures)


@pytest.fixture
def device() -> torch.device:
    """The device the kernels run on in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On a GPU, which is often lent for minutes, show a failure when it happens."""
    if report.failed and torch.cuda.is_available():
        print(f"\n{report.nodeid}\n{report.longreprtext[-2_000:]}", flush=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests recorded: what every kernel takes of each GPU, and the like."""
    tables: dict[str, list[str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, rows in report.user_properties:
                if name != EXECUTIONS:
                    tables.setdefault(name, []).extend(rows)
    for name, rows in tables.items():
        terminalreporter.section(name)
        for row in sorted(rows):
            terminalreporter.write_line(row)
    config = terminalreporter.config
    if EXECUTED in config.stash:
        lines, missing = executed_configurations(config)
        terminalreporter.section(f"executed as {config.getoption('as_capability')}")
        for line in [*lines, *(f"NOT EXECUTED: {name}" for name in missing)]:
            terminalreporter.write_line(line)
        terminalreporter.write_line(
            f"{len(lines)} of {len(lines) + len(missing)} configurations of the launch tables"
        )
