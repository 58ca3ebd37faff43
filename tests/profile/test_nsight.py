"""Nsight's exports, as small files of their layout."""

import sqlite3

import pytest

from hamner.errors import UserError
from hamner.profile.summary import summarize
from hamner.profile.trace import read_trace
from tests.profile.traces import H100

THREAD = 7


@pytest.fixture
def export(tmp_path):
    """Two steps of a matmul (600 us) and a norm (200 us) that starts 50 us later; nanoseconds."""
    path = tmp_path / "report.sqlite"
    database = sqlite3.connect(path)
    database.executescript(
        """
        CREATE TABLE StringIds (id INTEGER, value TEXT);
        CREATE TABLE TARGET_INFO_GPU (name TEXT);
        CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL
            (start INTEGER, end INTEGER, correlationId INTEGER, demangledName INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER,
            correlationId INTEGER, nameId INTEGER);
        CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, globalTid INTEGER, text TEXT,
            textId INTEGER);
        """
    )
    strings = [(1, "nvjet_a"), (2, "rms_norm_forward_kernel"), (3, "cudaLaunchKernel")]
    database.executemany("INSERT INTO StringIds VALUES (?, ?)", [*strings, (4, "forward")])
    database.execute("INSERT INTO TARGET_INFO_GPU VALUES (?)", (H100,))
    for step in range(2):
        begin, first = 1_000_000 * step, 10 * step
        for at, kernel, start, end in ((0, 1, 100, 700), (1, 2, 750, 950)):
            times = begin + 1000 * start, begin + 1000 * end
            row = (*times, first + at, kernel)
            database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?)", row)
            launch = (begin + 20_000, begin + 22_000, THREAD, first + at, 3)
            database.execute(
                "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?)", launch
            )
        ranges = [
            (begin, begin + 990_000, THREAD, f"ProfilerStep#{step}", None),
            (begin + 10_000, begin + 50_000, THREAD, None, 4),
            (begin + 60_000, None, THREAD, "a mark", None),
        ]
        database.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?)", ranges)
    database.commit()
    database.close()
    return path


def test_nsight_systems(export):
    summary = summarize(read_trace(export))
    assert (summary.device, summary.steps) == (H100, 2)
    assert summary.categories == pytest.approx({"matmul": 0.6, "norm": 0.2})
    assert summary.phases == pytest.approx({"forward": 0.8})
    assert summary.gaps.between_kernels_ms * 2 == pytest.approx(0.05 * 2)
    assert summary.gaps.waiting_for_cpu_ms * 2 == pytest.approx(0.15)


RAW = """program output
"ID","Kernel Name","gpu__time_duration.sum"
"","","usecond"
"0","nvjet_a","600.0"
"1","rms_norm_forward_kernel","200"
"""
DETAILS = """"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","nvjet_a","GPU Speed","Duration","ms","0.6"
"0","nvjet_a","GPU Speed","SM Frequency","Ghz","1.7"
"1","rms_norm_forward_kernel","GPU Speed","Duration","ns","200,000"
"""


@pytest.mark.parametrize("content", [RAW, DETAILS])
def test_nsight_compute(tmp_path, content):
    path = tmp_path / "report.csv"
    path.write_text(content)
    summary = summarize(read_trace(path))
    assert summary.categories == pytest.approx({"matmul": 0.6, "norm": 0.2})
    assert summary.idle_ms == pytest.approx(0.0)


def test_a_csv_without_durations(tmp_path):
    path = tmp_path / "report.csv"
    path.write_text('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n')
    with pytest.raises(UserError, match="holds no durations"):
        read_trace(path)


def test_another_database(tmp_path):
    path = tmp_path / "other.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (a INTEGER)")
    database.commit()
    database.close()
    with pytest.raises(UserError, match="is not Nsight Systems' export"):
        read_trace(path)
