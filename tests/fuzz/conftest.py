"""Every test of this folder runs with little memory to take and little time."""

import re
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

#: What a hostile file may make a reader allocate, beside what is there already.
SPARE_BYTES = 512 * 2**20

settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=250,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,  # a gate must not fail by chance; raise max_examples to look for more
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(120))


@pytest.fixture(autouse=True)
def little_memory():
    """An allocation of a gigabyte is refused, and so is a MemoryError in the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    size = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (size + SPARE_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
