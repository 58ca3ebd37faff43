import errno
import gzip
import itertools
import json
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamner.data import retry
from hamner.data.files import FileSource
from hamner.data.retry import RetriedSource
from hamner.data.shuffle import shuffled_documents
from hamner.errors import UserError
from tests.data.test_shuffle import ListFile

BLOCKS = [[f"{i}-{j}" for j in range(i % 4 + 1)] for i in range(12)]


class Flaky:
    """Raises instead of giving its n-th document, counted over all attempts, for each n given."""

    def __init__(self, failures, error=None):
        self._files = [ListFile(BLOCKS[0::2]), ListFile(BLOCKS[1::2])]
        self._failures = failures
        self._error = error or OSError("input/output error")
        self.given = itertools.count()

    def identity(self):
        return {"name": "flaky"}

    def documents(self, seed, epoch, state):
        for item in shuffled_documents(self._files, seed, epoch, state):
            if next(self.given) in self._failures:
                raise self._error
            yield item


UNDISTURBED = list(Flaky(()).documents(0, 0, None))


@pytest.fixture(autouse=True, scope="module")
def fast():
    with mock.patch.multiple(retry, ATTEMPTS=3, FIRST_DELAY_SECONDS=0.0):
        yield


@given(failures=st.sets(st.integers(0, 60)), stop=st.integers(1, len(UNDISTURBED)))
def test_documents_come_once_in_order_whatever_fails(failures, stop):
    """Also over a restart, from a state that went through JSON."""
    source, state, read = RetriedSource(Flaky(failures), "x"), None, []
    while len(read) < len(UNDISTURBED):
        try:
            limit = stop - len(read) if len(read) < stop else None
            for text, after in itertools.islice(source.documents(0, 0, state), limit):
                state = json.loads(json.dumps(after))
                read.append((text, after))
        except UserError:
            continue  # given up, and asked again later
    assert read == UNDISTURBED


def test_gives_up_after_so_many_failures_in_a_row(caplog):
    source = RetriedSource(Flaky({1, 2, 5, 6, 7}), "notes")
    documents, read = source.documents(0, 0, None), []
    with pytest.raises(UserError, match=r"--data notes: given up after 3 .* \(OSError: input"):
        for text, _ in documents:
            read.append(text)
    assert read == [text for text, _ in UNDISTURBED[:3]]
    assert caplog.text.count("--data notes: OSError: input/output error; attempt 2") == 2
    assert caplog.text.count("attempt 3") == 2


def test_given_up_source_gets_one_attempt_when_asked_again():
    source = RetriedSource(Flaky({0, 1, 2, 3, 4}), "notes")
    for _ in range(3):  # three attempts, then one, then one
        with pytest.raises(UserError, match="given up after 3 attempts"):
            next(source.documents(0, 0, None))
    assert next(source.documents(0, 0, None)) == UNDISTURBED[0]


def test_wrong_content_is_raised_at_once(caplog):
    source = RetriedSource(Flaky({4}, UserError("--data notes, line 3: not JSON")), "notes")
    with pytest.raises(UserError, match="line 3"):
        list(source.documents(0, 0, None))
    assert not caplog.records


def test_delays_grow_with_jitter_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 1.0)
    for failures, longest in [(1, 1), (2, 2), (5, 16), (7, 60), (20, 60)]:
        delays = {retry.delay(failures) for _ in range(50)}
        assert all(longest / 2 <= delay <= longest for delay in delays)
        assert len(delays) > 1


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "a.parquet"])
def test_file_that_goes_away_is_waited_for(tmp_path, monkeypatch, name):
    path, away = tmp_path / name, tmp_path / "a.gone"
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["a"]}), path)
    else:
        path.write_bytes(pa.Codec("zstd").compress(b"a", asbytes=True) if ".zst" in name else b"a")
    source = RetriedSource(FileSource(str(tmp_path)), str(tmp_path))
    path.rename(away)
    monkeypatch.setattr(retry.time, "sleep", lambda _: away.rename(path))
    assert [text for text, _ in source.documents(0, 0, None)] == ["a"]
    path.rename(away)
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=f"--data .* given up after 3 .*FileNotFoundError.*{name}"):
        list(source.documents(0, 0, None))


def test_a_disk_that_fails_below_a_compressed_file_says_nothing_of_its_content(
    tmp_path, monkeypatch
):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a"))
    source = RetriedSource(FileSource(str(path)), str(path))
    whole, faults = gzip.GzipFile.read, [OSError(errno.EIO, "Input/output error")]

    def read(file, size=-1):
        if faults:
            raise faults.pop()
        return whole(file, size)

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    assert [text for text, _ in source.documents(0, 0, None)] == ["a"]
    assert not faults
