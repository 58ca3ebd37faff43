"""The tests write the files of a run on disks that fail."""

import json
import resource

import pytest

from hamner.checkpoint.run_folder import RecordLog, RunFolder, append_record
from hamner.files import read_records


@pytest.fixture
def file_size_limit():
    """The fixture sets the largest size a file may have, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_is_written_whole_or_not(tmp_path, file_size_limit):
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1})
    before = path.read_bytes()
    file_size_limit(len(before) + 5)
    with pytest.raises(OSError):
        append_record(path, {"step": 2}, {"step": 3})
    assert path.read_bytes() == before


def test_records_wait_for_the_disk_in_order(tmp_path, file_size_limit):
    log = RecordLog(tmp_path / "metrics.jsonl")
    assert log.append({"step": 1}) is None
    file_size_limit(log.path.stat().st_size)
    assert log.append({"step": 2}).strerror
    assert log.append({"step": 3}).strerror
    assert [record["step"] for record in read_records(log.path)] == [1]
    file_size_limit(1 << 20)
    assert log.append({"step": 4}) is None
    assert [record["step"] for record in read_records(log.path)] == [1, 2, 3, 4]
    assert log.waiting == []


def test_a_vanished_folder_is_not_made_anew(tmp_path):
    log = RecordLog(tmp_path / "gone" / "metrics.jsonl")
    assert isinstance(log.append({"step": 1}), FileNotFoundError)
    assert not log.path.parent.exists()


def test_rewind_leaves_one_value_for_every_step(tmp_path):
    run = RunFolder(tmp_path)
    append_record(run.metrics, *({"step": step, "loss": 1 / step} for step in range(1, 8)))
    append_record(run.samples, {"step": 5, "text": "x"}, {"step": 6, "text": "y"})
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 8, "lo\xff\x00')
    run.rewind(5)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert records == [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    assert [record["step"] for record in read_records(run.samples)] == [5]
    run.amend(4, {"val_loss": 2.0})  # of a step whose record is not the last one
    assert list(read_records(run.metrics)) == records
    run.amend(5, {"val_loss": 2.0})
    assert list(read_records(run.metrics)) == [*records[:4], {**records[4], "val_loss": 2.0}]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}
    run.rewind(0)
    assert not list(tmp_path.iterdir())  # as before the first record


def test_what_is_no_record_is_kept_beside(tmp_path, caplog):
    run = RunFolder(tmp_path)
    text = '{"step": 1}\nnotes of mine\n{"step": 2}\n'
    run.metrics.write_text(text)
    run.rewind(1)
    assert list(read_records(run.metrics)) == [{"step": 1}]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == text
    (said,) = caplog.messages
    assert "metrics.jsonl has lines that are no records of a run (1), which are left" in said
