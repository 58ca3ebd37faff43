"""Every command reads its command line in one way."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from hamner.cli import read_ahead, read_flags
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.sft.__main__ import Origin as SftOrigin
from hamner.train.flags import Origin


@dataclass(frozen=True)
class Flags:
    """Flags of every kind."""

    run_dir: Path | None = None
    files: tuple[Path, ...] = ()
    data: tuple[str, ...] = ("builtin",)
    resume: bool = False
    steps: int = 7


@dataclass(frozen=True)
class Some:
    """Those that are read ahead."""

    run_dir: Path | None = None
    resume: bool = False


LINES = (
    (["--run-dir", "a"], "a", False),
    (["--run_dir", "a", "--resume"], "a", True),
    (["--run_dir=a", "--steps", "1", "--run-dir=b", "--resume", "--no-resume"], "b", False),
    (["--data", "a", "--run-dir=b=c", "--steps=1"], "b=c", False),
    (["--steps", "3", "--no_resume", "--resume", "--files", "x", "--run-dir", "None"], None, True),
)


@pytest.mark.parametrize(("args", "run_dir", "resume"), LINES)
def test_what_is_read_ahead_is_what_is_read(args, run_dir, resume):
    expected = (run_dir and Path(run_dir), resume)
    for form in (read_ahead(Some, args, "x"), read_flags(Flags, args, "x")):
        assert (form.run_dir, form.resume) == expected


def test_help_waits_for_the_defaults(capsys):
    assert read_ahead(Some, ["--help", "--run-dir", "a", "-h"], "x") == Some(Path("a"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", [Origin, SftOrigin])
def test_flags_read_ahead_are_those_of_training(form):
    ours = {f.name: (f.type, f.default) for f in fields(form) if f.name != "checkpoint"}
    theirs = {f.name: (f.type, f.default) for f in fields(TrainConfig)}
    assert ours.items() <= theirs.items()


def test_the_home_folder_is_meant_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flags = read_flags(Flags, ["--run-dir=~/x", "--files", "~", "a/~", "./~/b", "c~"], "x")
    assert flags.run_dir == Path("/home/me/x")
    assert flags.files == tuple(map(Path, ("/home/me", "a/~", "~/b", "c~")))
    assert read_flags(TrainConfig, ["--tokenizer=~/t"], "x").tokenizer == "/home/me/t"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--run-dir=~nobody-here/x"], "~nobody-here/x: there is no home folder ~nobody-here"),
        (["--run-dir="], "a path is empty"),
        (["--files", "a", "~nobody-here"], "./~nobody-here for a file of that name"),
        (["--data", "a", "--data", "--steps", "1"], "--data has no value"),
        (["--data", "a", "--data=--steps=1"], "--data=--steps=1 names a flag"),
    ],
)
def test_a_path_that_means_nothing_is_a_sentence(args, sentence):
    with pytest.raises(UserError, match=sentence):
        read_flags(Flags, args, "x")


def test_lists_are_joined():
    args = ["--data", "a", "b", "--steps", "1", "--data", "c", "--data=d=0.5", "e"]
    assert read_flags(Flags, args, "x").data == ("a", "b", "c", "d=0.5", "e")
