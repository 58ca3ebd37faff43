"""Runs the kernels where they can run: compiled on a GPU, in Triton's interpreter elsewhere."""

import os

# Each worker and each process a test starts gets one thread: more would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton reads the variable when a kernel is decorated, so it must be set before any is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers; none on a GPU, whose memory and timings the tests do not share."""
    return 0 if torch.cuda.is_available() else 2


@pytest.fixture
def device() -> torch.device:
    """The device the kernels run on in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what every kernel takes of each GPU, as the compile gate found it."""
    rows = [
        row
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, rows in report.user_properties
        if name == "compile_gate"
        for row in rows
    ]
    if rows:
        terminalreporter.section("compile gate")
        for row in sorted(rows):
            terminalreporter.write_line(row)
