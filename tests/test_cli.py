"""Every command reads its command line in one way."""

import runpy
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import hamner
from hamner.cli import PARTS, read_ahead, read_flags, require_whole_package
from hamner.config.model import ModelConfig
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.sft.__main__ import Origin as SftOrigin
from hamner.train.flags import Origin

FOLDER = Path(hamner.__file__).parent


@dataclass(frozen=True)
class Flags:
    """Flags of every kind."""

    run_dir: Path | None = None
    files: tuple[Path, ...] = ()
    data: tuple[str, ...] = ("builtin",)
    resume: bool = False
    steps: int = 7
    kind: Literal["a", "b"] | None = None
    """default as it is"""
    pair: tuple[float, float] | None = None
    lr: float | None = 2.0


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


@dataclass(frozen=True)
class Ahead:
    """Nothing is said of these flags here."""

    steps: int = 7
    kind: Literal["a", "b"] | None = None


@pytest.mark.parametrize("args", [["--steps", "1e3"], ["--steps"], ["--kind", "c"]])
def test_what_is_wrong_is_said_once_with_all_that_is_known_of_the_flag(args, capsys):
    assert read_ahead(Ahead, args, "x") == Ahead()
    output = capsys.readouterr()
    assert output.out + output.err == ""
    with pytest.raises(SystemExit) as exit:
        read_flags(Flags, args, "x")
    assert exit.value.code == 2


def test_help_waits_for_the_defaults(capsys):
    assert read_ahead(Some, ["--help", "--run-dir", "a", "-h"], "x") == Some(Path("a"))
    assert capsys.readouterr().out == ""


def test_help_shows_the_values_of_optional_flags_and_no_default_none(capsys):
    with pytest.raises(SystemExit):
        read_flags(Flags, ["--help"], "x")
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("--run-dir PATH", "--kind {a,b}", "--pair FLOAT FLOAT", "--lr FLOAT"):
        assert text in shown
    assert "default as it is --pair" in shown.replace("│ ", "")
    assert "(default: 7)" in shown and "(default: 2.0)" in shown and "(default: builtin)" in shown
    assert "None" not in shown and "(default: )" not in shown


@pytest.mark.parametrize(
    ("args", "values"),
    [
        ([], (None, None, 2.0)),
        (["--kind", "a", "--pair", "1", "2", "--lr=3"], ("a", (1.0, 2.0), 3.0)),
        (["--kind", "None", "--pair", "None", "--lr", "None"], (None, None, None)),
    ],
)
def test_an_optional_flag_reads_its_values_and_none(args, values):
    flags = read_flags(Flags, args, "x")
    assert (flags.kind, flags.pair, flags.lr) == values


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--kind", "c"], "invalid choice 'c' for argument '--kind'"),
        (["--pair", "1", "2", "3"], "Error parsing --pair: could not parse arguments"),
        (["--lr", "x"], "Error parsing --lr: could not convert string to float: 'x'"),
        (["--lr", "none"], "Error parsing --lr: could not convert string to float: 'none'"),
    ],
)
def test_what_an_optional_flag_cannot_be_is_refused(args, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        read_flags(Flags, args, "x")
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert complaint.lower() in " ".join((output.out + output.err).split()).lower()


@pytest.mark.parametrize("form", [Origin, SftOrigin])
def test_flags_read_ahead_are_those_of_training(form):
    # Nothing given for --option is what --init-from needs to know.
    own = ("checkpoint", "option") if form is Origin else ("checkpoint",)
    ours = {f.name: (f.type, f.default) for f in fields(form) if f.name not in own}
    theirs = {f.name: (f.type, f.default) for f in (*fields(TrainConfig), *fields(ModelConfig))}
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
        (["--run-dir=~nobody-here/x"], "~nobody-here/x: no home folder is known for ~nobody-here"),
        (["--run-dir="], "a path is empty"),
        (["--files", "a", "~nobody-here"], "no home folder is known for ~nobody-here"),
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


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/__main__.py")), ids=lambda f: f.parent.name)
def test_a_file_of_a_command_is_not_the_command(file, capsys):
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(file), run_name="__main__")
    assert exit.value.code == 2
    command = f"python -m hamner.{file.parent.name}"
    assert capsys.readouterr().err == f"error: start this with {command}\n"


def test_the_package_is_whole():
    require_whole_package(FOLDER)
    assert set(PARTS) == {path.parent.name for path in FOLDER.glob("*/__init__.py")}


def test_a_folder_of_the_name_is_not_the_package(tmp_path, monkeypatch):
    """As Python finds it: first the folder it was started in, then what is installed."""
    other = tmp_path / "hamner"
    monkeypatch.setattr(hamner, "__path__", [str(other)])
    with pytest.raises(UserError, match=f"the folder {other} has the name of the package"):
        require_whole_package(FOLDER)
    for name in PARTS:
        (other / name).mkdir(parents=True)
        (other / name / "__init__.py").touch()
    require_whole_package(other)
    shutil.rmtree(other / "model")
    with pytest.raises(UserError, match=f"{other} has no model"):
        require_whole_package(other)
    monkeypatch.setattr(hamner, "__file__", None)
    with pytest.raises(UserError, match="start the command in another"):
        require_whole_package(other)


def test_parts_of_the_package_are_not_taken_for_pythons(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", str(FOLDER), str(FOLDER / "profile"), "/elsewhere"])
    monkeypatch.chdir(FOLDER.parent)
    require_whole_package(FOLDER)
    assert sys.path == ["", "/elsewhere"]
