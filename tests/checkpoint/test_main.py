"""`python -m hamner.checkpoint` knows its words, and says so to others."""

import subprocess
import sys

import pytest

from hamner.checkpoint.__main__ import main
from hamner.errors import UserError


@pytest.mark.parametrize("args", [["--help"], ["-h"]])
def test_help_names_the_word(args, capsys):
    assert main(args) == 0
    assert "usage: python -m hamner.checkpoint import" in capsys.readouterr().out


def test_help_of_import_names_its_flags(capsys):
    with pytest.raises(SystemExit) as end:
        main(["import", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: python -m hamner.checkpoint import" in printed
    assert all(flag in printed for flag in ("--run-dir", "--tokenizer"))


@pytest.mark.parametrize("args", [[], ["export", "old.pt"]])
def test_any_other_word_is_refused(args):
    with pytest.raises(UserError, match="takes `import`: python -m hamner.checkpoint import"):
        main(args)


def test_a_wrong_word_ends_with_code_2_and_one_sentence():
    command = [sys.executable, "-m", "hamner.checkpoint", "export"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: python -m hamner.checkpoint takes `import`")
    assert result.stderr.count("\n") == 1
