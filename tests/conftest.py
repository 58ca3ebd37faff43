"""Runs the kernels where they can run: compiled on a GPU, in Triton's interpreter elsewhere."""

import gc
import importlib.util
import os

# Each worker and each process a test starts gets one thread: more would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton reads the variable when a kernel is decorated, so it must be set before any is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import avoid_repetition

    avoid_repetition()


NEEDS = {
    "chat/test_server.py": "openai",
    "evaluate/test_harness.py": "lm_eval",
    "export/test_export.py": "gguf",
    "export/test_tokenizer.py": "gguf",
    "model/test_rotary.py": "gguf",
    "test_architecture.py": "grimp",
    "test_chatbot_path.py": "gguf",
}
"""packages of hamner[test] that a machine with a GPU may lack, by the file that imports them; none
of the files has a test that needs a GPU"""
collect_ignore = [
    file
    for file, package in NEEDS.items()
    if torch.cuda.is_available() and importlib.util.find_spec(package) is None
]


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
                tables.setdefault(name, []).extend(rows)
    for name, rows in tables.items():
        terminalreporter.section(name)
        for row in sorted(rows):
            terminalreporter.write_line(row)
