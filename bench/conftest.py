"""Benchmarks run one at a time, whatever the tests do."""

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """No workers beside this process: they would share what is being measured."""
    return 0
