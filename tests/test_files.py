"""The tests make files that are whole or not there, and read JSON that is damaged."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hamner import files
from hamner.checkpoint.format import CheckpointError
from hamner.checkpoint.pt_file import read_pt
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.files import (
    is_pipe_or_device,
    made_whole,
    read_json,
    refuse_pipe,
    refuse_unread,
    require_writable,
    usual_permissions,
    write_output,
    write_whole,
    writing,
)
from hamner.plan.report_card import ReportCard
from hamner.plan.run_curve import read_run
from hamner.profile.trace import read_trace
from tests.forked import run_module


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with made_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_whole(tmp_path):
    path = tmp_path / "folder"
    with made_whole(path) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("x")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave an empty one, and the old one is gone."""
    path, flushed = tmp_path / "file", []

    def flush(temporary: Path) -> None:
        assert path.read_text() == f"{len(flushed)}"
        assert temporary.read_text() == f"{len(flushed) + 1}"
        flushed.append(temporary)

    monkeypatch.setattr(files, "flush", flush)
    path.write_text("0")
    write_whole(path, "1")
    with made_whole(path) as temporary:
        temporary.write_text("2")
    assert path.read_text() == "2"
    assert len(flushed) == 2


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, kind):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(kind), made_whole(path) as temporary:
        temporary.write_text("half")
        raise kind
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_are_as_readable_as_any_file(tmp_path, umask, mode):
    path = tmp_path / "model.safetensors"
    before = os.umask(umask)
    try:
        with usual_permissions(path):
            save_file({"weight": torch.ones(3)}, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_file_that_fails_is_not_there(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError), usual_permissions(path):
        raise OSError
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "file.json cannot be read: .*No such file"),
        (b"{", "file.json cannot be read: Expecting"),
        (b"\xff", "file.json cannot be read: .*utf-8"),
        (b"[" * 100_000, "file.json cannot be read: nested too deeply"),
        (b"[]", "file.json is not a JSON object"),
    ],
)
@pytest.mark.parametrize("error", [UserError, CheckpointError])
def test_json_that_cannot_be_read(tmp_path, content, reason, error):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=reason):
        read_json(path, error)


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with (
        pytest.raises(UserError, match="--output pipe cannot be written: a pipe or a device is"),
        writing("--output pipe"),
    ):
        write_whole(pipe, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_only_a_pipe_that_has_a_name_may_have_no_reader(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(UserError, match=f"--output {path} is a pipe, which nobody may"):
            refuse_unread(path, "--output")
    reader, writer = os.pipe()
    try:
        for name in (f"/dev/fd/{writer}", "/dev/null", "/dev/stdout", __file__, tmp_path / "new"):
            refuse_unread(Path(name), "--output")
    finally:
        os.close(reader)
        os.close(writer)


def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path):
    """All that reads a file which people name: no writer comes, so reading would never end."""
    for name in ("pipe.jsonl", "pipe.json", "pipe.pt"):
        os.mkfifo(tmp_path / name)
    for read, name in (
        (read_run, "pipe.jsonl"),
        (ReportCard.read, "pipe.json"),
        (read_trace, "pipe.json"),
        (lambda path: load_tokenizer(str(path)), "pipe.json"),
        (read_pt, "pipe.pt"),
    ):
        with pytest.raises(UserError, match=rf"{name}: is a pipe or a device, not a file"):
            read(tmp_path / name)
    # A file, a folder and nothing are other readers' business.
    for path in (tmp_path, tmp_path / "nothing", Path(__file__)):
        refuse_pipe(path, "--data")


def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    path = tmp_path / "x"
    for content, is_ours in ((b"", True), (b"# A plan", True), (b"#", False), (b"mine", False)):
        path.write_bytes(content)
        expected = contextlib.nullcontext()
        if not is_ours:
            expected = pytest.raises(UserError, match=r"--report \S+x is there and holds something")
        with expected:
            require_writable(path, "--report", begins=b"# ")


def test_an_output_goes_where_the_user_said(tmp_path):
    """Through a link into its file, and into a device or stream, which nothing replaces."""
    (target := tmp_path / "target").write_text("old")
    (link := tmp_path / "link").symlink_to(target)
    write_output(link, b"new")
    assert link.is_symlink() and target.read_text() == "new"
    write_output(Path("/dev/null"), b"x")
    assert is_pipe_or_device(Path("/dev/null"))
    with target.open("w") as file:  # as a shell's > does
        stream = Path(f"/dev/fd/{file.fileno()}")
        require_writable(stream, "--output", begins=b"{")
        write_output(stream, b"through a stream")
    assert target.read_text() == "through a stream"


@pytest.mark.parametrize(
    ("command", "flag", "args"),
    [
        ("hamner.data", "--output", ["train-tokenizer", "--data", "builtin"]),
        ("hamner.plan", "--report", ["--option", "tiny"]),
        ("hamner.profile", "--picture", ["read", "trace.json.gz"]),
    ],
)
def test_commands_overwrite_only_what_they_wrote(command, flag, args, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    result = run_module(command, *args, flag, path)
    assert result.returncode == 2
    assert f"error: {flag} {path} is there and holds something else" in result.stderr
    assert path.read_text() == '{"step": 1}\n'
