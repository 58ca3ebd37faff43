import os
import signal
import sys
from functools import partial

import pytest

from hamner.data.__main__ import main
from hamner.data.shards import ShardSource
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.errors import UserError
from tests import forked
from tests.imports import output_without

run = partial(forked.run_module, "hamner.data", timeout=300)


def test_prepare_writes_shards_that_can_be_read(tmp_path, write_jsonl):
    path = write_jsonl("a.jsonl", [f"document {i}" for i in range(200)])
    output = tmp_path / "shards"
    arguments = ["prepare", "--data", path, "--output", output, "--vocab-size", 512]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout and "validation: " in done.stdout
    source = ShardSource(str(output), load_tokenizer(vocab_size=512))
    assert len(list(source.tokens("train", 0, 0, None))) > 190
    assert run(*arguments).returncode == 0  # again: already done


def test_interrupted_preparation_exits_with_130_and_goes_on(tmp_path, write_jsonl):
    path = write_jsonl("a.jsonl", [f"{i} {'some words ' * 50}" for i in range(20_000)])
    output = tmp_path / "shards"
    command = [sys.executable, "-m", "hamner.data", "prepare", "--data", str(path)]
    command += ["--output", str(output), "--vocab-size", "512", "--shard-tokens", "100_000"]
    process = forked.Popen(command)
    process.wait_until((output / "train-00001.offsets").exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")
    done = forked.run(command)
    assert done.returncode == 0, done.stderr
    source = ShardSource(str(output), load_tokenizer(vocab_size=512))
    splits = ("train", "validation")
    assert sum(1 for s in splits for _ in source.tokens(s, 0, 0, None)) == 20_000


def test_train_tokenizer_writes_one_that_can_be_loaded(tmp_path):
    output = tmp_path / "tokenizer.json"
    main(["train-tokenizer", "--output", str(output), "--vocab-size", "400", "--max-mib", "1"])
    assert load_tokenizer(str(output)).vocab_size == 400


def test_training_a_tokenizer_leaves_validation_documents_out(tmp_path, write_jsonl):
    output = tmp_path / "tokenizer.json"
    path = write_jsonl("a.jsonl", [f"word{i} " * 40 for i in range(40)])
    with pytest.raises(UserError, match="only yields 261 entries"):
        main(
            ["train-tokenizer", "--data", str(path), "--output", str(output)]
            + ["--vocab-size", "400", "--val-fraction", "0.9999"]
        )


def test_help_names_every_flag_without_loading_torch():
    output = output_without(["torch", "datasets", "pyarrow"], "hamner.data", "prepare", "--help")
    for flag in ("data", "output", "tokenizer", "vocab-size", "shard-tokens", "val-fraction"):
        assert f"--{flag} " in output


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing.txt", "no such file or folder"),
        (".", "the folder has no file that ends in"),
        ("*.nothing", "the glob has no file"),
        ("builtin=0", "must be a positive number, not '0'"),
        ("hf:typo", "must be hf:owner/name"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, data, message):
    done = run("prepare", "--data", data, "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --data {data}")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-fraction", "1.5"], "--val-fraction 1.5: must be"),
        (["--shard-tokens", "0"], "--shard-tokens 0: must be"),
        (["--vocab-size", "10"], "--vocab-size 10"),
        (["--tokenizer", "missing.json"], "--tokenizer missing.json: no such file"),
    ],
)
def test_bad_flags_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main(["prepare", "--output", str(tmp_path / "out"), *flags])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/tokenizer.json", "the folder .*missing does not exist; create it"),
        ("pipe", "is a pipe, which nobody may ever read"),
        (".", "is a folder; name a file in it"),
        ("/dev/null", "is a pipe or a device, not a file"),
    ],
)
def test_output_of_the_tokenizer_must_be_a_file_in_a_folder(tmp_path, name, reason):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"--output .*{reason}"):
        main(["train-tokenizer", "--output", str(tmp_path / name)])


@pytest.mark.parametrize("flag", ["--max-mib=0", "--vocab-size=260", f"--vocab-size={10**20}"])
def test_numbers_that_no_tokenizer_has_are_refused(tmp_path, flag):
    with pytest.raises(UserError, match=f"{flag.replace('=', ' ')}: must be at least"):
        main(["train-tokenizer", "--output", str(tmp_path / "t.json"), flag])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_take_the_tokenizer(tmp_path, monkeypatch):
    def fail(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(UserError, match=r"--output .*t\.json cannot be written: No space left on"):
        main(
            [
                "train-tokenizer",
                "--output",
                f"{tmp_path}/t.json",
                *["--vocab-size", "300", "--max-mib", "1"],
            ]
        )


def test_output_of_shards_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output .*file is not a folder: give a new or an empty"):
        main(["prepare", "--output", str(tmp_path / "file")])
