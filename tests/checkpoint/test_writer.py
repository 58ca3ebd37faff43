"""The tests save beside training, on disks that fail in every way."""

import os
import resource
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint import writer
from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.writer import RETRY_SECONDS, BackgroundSaver

NOBODY = 65534


class Clock:
    """The clock shows the seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(writer, "monotonic", Clock())
    return writer.monotonic


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


@pytest.fixture
def saver(folder):
    saver = BackgroundSaver(folder, keep=3, keep_every=0)
    yield saver
    saver.close()


def begin(saver: BackgroundSaver, step: int, elements: int = 50) -> torch.Tensor:
    weight = torch.full((elements,), float(step))
    saver.begin(
        step,
        model={"weight": weight},
        optimizer={"exp_avg.weight": weight + 1, "exp_avg_sq.weight": weight + 2},
        state={"step": step},
    )
    return weight


def loaded(saved: Checkpoint, elements: int = 50) -> torch.Tensor:
    saved.verify()
    weight = torch.zeros(elements)
    saved.load_model({"weight": weight})
    return weight


@pytest.fixture
def may_write(monkeypatch) -> threading.Event:
    """The writer waits until it is set."""
    event = threading.Event()
    real_save = checkpoint.save
    monkeypatch.setattr(
        writer.checkpoint,
        "save",
        lambda *args, **kwargs: event.wait(10) and real_save(*args, **kwargs),
    )
    return event


def test_what_is_written_is_the_state_of_the_moment(saver, may_write):
    """Training goes on while the thread has not written a byte yet."""
    weight = begin(saver, 3)
    weight.fill_(-1.0)
    assert saver.collect() is None
    may_write.set()
    saved = saver.wait()
    assert torch.equal(loaded(saved), torch.full((50,), 3.0))
    assert saved.state() == {"step": 3}
    assert saver.wait() is None


def test_a_save_where_no_more_memory_may_be_pinned(saver, monkeypatch):
    real_empty = torch.empty

    def empty(*args, pin_memory=None, **how):
        if pin_memory is not None:
            raise RuntimeError("CUDA error: out of memory")
        return real_empty(*args, **how)

    monkeypatch.setattr(torch, "empty", empty)
    begin(saver, 3)
    assert torch.equal(loaded(saver.wait()), torch.full((50,), 3.0))


def test_one_save_at_a_time(saver, may_write):
    begin(saver, 1)
    saver.wanted = True
    assert not saver.may_begin(True)
    with pytest.raises(RuntimeError, match="under way"):
        begin(saver, 2)
    may_write.set()
    assert saver.wait().step == 1
    assert saver.may_begin(True)


def test_a_failed_save_is_wanted_again_later(saver, folder, clock):
    """A mount may vanish and come back: no folder is made instead of it."""
    assert begin(saver, 1) is not None
    saver.wait()
    away = folder.rename(folder.with_name("away"))
    begin(saver, 2)
    error = saver.wait()
    assert isinstance(error, FileNotFoundError)
    assert not folder.exists()
    assert saver.wanted
    assert not saver.may_begin(True)
    away.rename(folder)
    clock.now = RETRY_SECONDS
    assert saver.may_begin(True)
    begin(saver, 3)
    assert torch.equal(loaded(saver.wait()), torch.full((50,), 3.0))
    assert [saved.step for saved in checkpoint.find(folder)] == [1, 3]


def test_a_defect_is_not_taken_for_a_disk(saver):
    saver.begin(1, model={"w": torch.ones(1)}, optimizer={}, state={"step": object()})
    with pytest.raises(TypeError):
        saver.wait()


def assert_previous_is_whole(folder: Path, error: OSError | Checkpoint, step: int) -> None:
    assert isinstance(error, OSError)
    assert error.strerror
    assert [path.name for path in folder.iterdir()] == [f"step_{step:08d}"]
    loaded(checkpoint.find(folder)[-1])


@pytest.fixture
def small_disk(tmp_path):
    """The disk is a real file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a tmpfs can be mounted by root only; the full disk is tested by file size too")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk):
    """Three files of 60 KB fit once; for more there is no room until some is made."""
    saver = BackgroundSaver(small_disk, keep=1, keep_every=0)
    begin(saver, 1, elements=15_000)
    assert saver.wait().step == 1
    begin(saver, 2, elements=15_000)
    error = saver.wait()
    assert isinstance(error, OSError)
    assert error.strerror == "No space left on device"
    assert [path.name for path in small_disk.iterdir()] == ["step_00000001"]
    loaded(checkpoint.find(small_disk)[0], elements=15_000)
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    begin(saver, 3, elements=15_000)
    assert saver.wait().step == 3
    assert [saved.step for saved in checkpoint.find(small_disk)] == [3]
    saver.close()


def test_read_only_disk(small_disk):
    saver = BackgroundSaver(small_disk, keep=1, keep_every=0)
    begin(saver, 1)
    saver.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    begin(saver, 2)
    error = saver.wait()
    assert_previous_is_whole(small_disk, error, 1)
    assert error.strerror == "Read-only file system"
    saver.close()


@pytest.fixture
def without_privilege():
    """The fixture lets go of root's right to write everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    yield
    os.seteuid(before)


def test_folder_without_permission(without_privilege):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        saver = BackgroundSaver(folder, keep=1, keep_every=0)
        begin(saver, 1)
        saver.wait()
        folder.chmod(0o555)
        begin(saver, 2)
        error = saver.wait()
        saver.close()
        assert_previous_is_whole(folder, error, 1)
        assert error.strerror == "Permission denied"
        folder.chmod(0o755)


def test_files_that_may_not_grow(saver, folder):
    """The kernel cuts the writer off in the middle of a file."""
    begin(saver, 1)
    saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        begin(saver, 2, elements=50)
        assert saver.wait().step == 2
        saver._host.clear()
        begin(saver, 3, elements=1 << 15)
        error = saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(error, OSError)
    assert error.strerror == "File too large"
    assert [saved.step for saved in checkpoint.find(folder)] == [1, 2]
    assert not list(folder.glob(".saving_*"))


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_file_system_that_fails(saver, folder, monkeypatch, call):
    """Every kind of call can have an input/output error."""
    begin(saver, 1)
    saver.wait()

    def fail(*_, **__):
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, call)), fail)
        begin(saver, 2)
        error = saver.wait()
    assert_previous_is_whole(folder, error, 1)
    assert error.strerror == "Input/output error"


def test_records_are_on_disk_before_the_checkpoint(folder, tmp_path, monkeypatch):
    records, order = tmp_path / "metrics.jsonl", []
    records.write_text("{}\n")
    for module in (writer, checkpoint):
        monkeypatch.setattr(module, "flush", order.append)
    saver = BackgroundSaver(
        folder, keep=1, keep_every=0, records=(records, tmp_path / "samples.jsonl")
    )
    begin(saver, 1)
    saver.wait()
    saver.close()
    temporary = folder / ".saving_00000001"
    files = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert order[0] == records
    assert set(order[1:-2]) == {temporary / name for name in files}
    assert order[-2:] == [temporary, folder]
