import contextlib
import hashlib
import itertools
import json
import os

import numpy as np
import pytest

from hamner.data import retry, shards
from hamner.data.bad_rows import BadRows
from hamner.data.documents import split_of
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.prepare import prepare
from hamner.data.shards import ShardSource
from hamner.data.sources import open_source
from hamner.data.specs import parse_specs
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.errors import UserError
from hamner.progress import Status, Task

TEXTS = [f"Document {i} says {' '.join(str(i * j) for j in range(i % 29))}." for i in range(300)]


class Watched(Status):
    """The status calls `see` with the documents so far, after each."""

    def __init__(self, see):
        class WatchedTask(Task):
            def __setattr__(self, name, value):
                super().__setattr__(name, value)
                if name == "note" and value:
                    see(int(value.split(" of ")[1].split()[0]))

        self.kind = WatchedTask

    @contextlib.contextmanager
    def task(self, what, total=None, unit=""):
        task = self.kind(what, total, unit)
        yield task


@pytest.fixture
def corpus(write_jsonl):
    return str(write_jsonl("corpus.jsonl", [*TEXTS, "", " "]))


@pytest.fixture
def prepared(corpus, tmp_path, tokenizer):
    """A folder of several shards."""
    output = tmp_path / "shards"
    prepare([corpus], output, tokenizer, shard_tokens=5000, val_fraction=0.1)
    return output


def documents(folder, tokenizer, split, seed=0, epoch=0):
    source = ShardSource(str(folder), tokenizer)
    return [tokenizer.decode(ids) for ids, _ in source.tokens(split, seed, epoch, None)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_in_its_split_once(prepared, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "CHECKED_TOKENS", 999)  # a few reads of each
    for split in ("train", "validation"):
        expected = [f"{t}<|endoftext|>" for t in TEXTS if split_of(t, 0.1) == split]
        found = documents(prepared, tokenizer, split)
        assert sorted(found) == sorted(expected)
        assert found == documents(prepared, tokenizer, split)
        assert found != documents(prepared, tokenizer, split, epoch=1)
        assert found != documents(prepared, tokenizer, split, seed=1)


def test_index_describes_the_files(prepared, tokenizer):
    index = json.loads((prepared / "index.json").read_text())
    assert index["tokenizer"] == tokenizer.fingerprint
    assert (index["dtype"], index["vocab_size"], index["end_of_text"]) == ("uint16", 512, 0)
    assert index["skipped"] == 2
    assert len([s for s in index["shards"] if s["split"] == "train"]) > 2
    named = {name for s in index["shards"] for name in (s["file"], s["offsets"])}
    assert named | {"index.json"} == {path.name for path in prepared.iterdir()}
    for shard in index["shards"]:
        data = (prepared / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        tokens = np.frombuffer(data, dtype="<u2")
        assert len(tokens) == shard["tokens"]
        offsets = np.fromfile(prepared / shard["offsets"], dtype="<u8")
        assert len(offsets) == shard["documents"] + 1
        assert (tokens[offsets[1:] - 1] == 0).all() and (tokens == 0).sum() == shard["documents"]


def test_large_vocabulary_takes_32_bits(corpus, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["vocab"] |= {f"unused {i}": i for i in range(512, 2**16 + 1)}
    large = Tokenizer(json.dumps(definition), "large")
    assert large.vocab_size == 2**16 + 1
    index = prepare([corpus], tmp_path / "large", large)
    assert index["dtype"] == "uint32"
    expected = [f"{t}<|endoftext|>" for t in TEXTS if split_of(t, 0.01) == "train"]
    assert sorted(documents(tmp_path / "large", large, "train")) == sorted(expected)


def test_shards_train_as_the_text_does(prepared, corpus, tokenizer):
    spec = f"shards:{prepared}"
    config = DataConfig((spec,), seq_len=16, batch_size=2, seed=0)
    loader = TrainLoader(config, tokenizer)
    for _ in range(50):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [next(loader).inputs.tolist() for _ in range(2000)]
    progress = loader.progress()[spec]
    loader.close()
    assert progress["epochs"] >= 1
    resumed = TrainLoader(config, tokenizer)
    resumed.load_state_dict(state)
    assert [next(resumed).inputs.tolist() for _ in range(2000)] == expected
    resumed.close()
    text = TrainLoader(DataConfig((corpus,), 16, 2, 0, 0.1), tokenizer)
    from_text, from_shards = text.validation_rows(10**6), resumed.validation_rows(10**6)
    assert from_text.inputs.shape == from_shards.inputs.shape


@pytest.mark.parametrize("documents_before", [0, 3, 120, 299, 500])
def test_interrupted_preparation_goes_on(
    corpus, write_jsonl, tmp_path, tokenizer, documents_before
):
    specs = [corpus, str(write_jsonl("more.jsonl", [f"more {text}" for text in TEXTS]))]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"shard_tokens": 4000, "val_fraction": 0.1}
    prepare(specs, whole, tokenizer, **options)

    def interrupt(documents):
        if documents > documents_before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(specs, broken, tokenizer, **options, status=Watched(interrupt))
    with pytest.raises(UserError, match="no index.json there"):
        ShardSource(str(broken), tokenizer)
    seen = []
    prepare(specs, broken, tokenizer, **options, status=Watched(seen.append))
    assert contents(broken) == contents(whole)
    if documents_before >= 120:
        assert seen[0] > 1  # finished shards were not made again
    again = prepare(specs, broken, tokenizer, **options, status=Watched(interrupt))
    assert again["skipped"] == 2


@pytest.mark.parametrize("fails_at", range(13))
def test_crash_in_any_write_leaves_no_half_shard(
    corpus, tmp_path, tokenizer, monkeypatch, fails_at
):
    """The disk is full at the n-th file; what has its final name is whole."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"shard_tokens": 6000, "val_fraction": 0.1}
    prepare([corpus], whole, tokenizer, **options)
    fsync, calls = os.fsync, itertools.count()

    def fail(descriptor):
        if next(calls) >= fails_at:
            raise OSError("no space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="--output .*cannot be written .*no space left"):
        prepare([corpus], broken, tokenizer, **options)
    monkeypatch.setattr(os, "fsync", fsync)
    reference = contents(whole)
    for name, data in contents(broken).items():
        if not name.endswith(".new") and name != "progress.json":
            assert data == reference[name]
    prepare([corpus], broken, tokenizer, **options)
    assert contents(broken) == reference


def test_folder_of_something_else_is_refused(corpus, tmp_path, tokenizer, prepared):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"--output .*holds other files \(letter.txt\)"):
        prepare([corpus], tmp_path / "home", tokenizer)
    with pytest.raises(UserError, match=r"--output .*another preparation \(val_fraction was 0.1"):
        prepare([corpus], prepared, tokenizer, shard_tokens=5000, val_fraction=0.2)
    with pytest.raises(UserError, match="--output .*letter.txt is not a folder"):
        prepare([corpus], tmp_path / "home" / "letter.txt", tokenizer)
    with pytest.raises(UserError, match="--output .*cannot be written"):
        prepare([corpus], tmp_path / "home" / "letter.txt" / "shards", tokenizer)


@pytest.mark.parametrize(
    ("specs", "message"),
    [(["builtin=2"], "every document once"), (["shards:x"], "shards already")],
)
def test_specs_that_make_no_sense_are_refused(tmp_path, tokenizer, specs, message):
    with pytest.raises(UserError, match=message):
        prepare(specs, tmp_path / "out", tokenizer)


def test_empty_source_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(UserError, match="a.txt: no document with text"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer)


def test_other_tokenizer_is_refused(prepared):
    with pytest.raises(UserError, match="another tokenizer of 512 entries .*--vocab-size"):
        ShardSource(str(prepared), load_tokenizer(vocab_size=600))


def test_missing_folder_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="--data shards:.*no index.json there; make one with"):
        ShardSource(str(tmp_path / "missing"), tokenizer)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{", b"\xff", '{"format": "other"}', '{"format": "hamner-shards", "version": 2}'],
)
def test_index_that_is_none_is_refused(prepared, tokenizer, index):
    path = prepared / "index.json"
    path.write_bytes(index if isinstance(index, bytes) else index.encode())
    with pytest.raises(UserError, match="index.json"):
        ShardSource(str(prepared), tokenizer)


@pytest.mark.parametrize("key", ["dtype", "shards"])
@pytest.mark.parametrize("value", [None, 7, "x", [1], [{}]])
def test_damaged_index_is_refused(prepared, tokenizer, key, value):
    path = prepared / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match="index.json is damaged"):
        ShardSource(str(prepared), tokenizer)


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00000.offsets"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_wrong_size_is_refused_at_open(prepared, tokenizer, name, damage):
    path = prepared / name
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(data[:-2])
    with pytest.raises(UserError, match=f"{name} has .* bytes instead of {len(data):,}"):
        ShardSource(str(prepared), tokenizer)


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00000.offsets"])
def test_changed_content_is_refused_when_read(prepared, tokenizer, name):
    path = prepared / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x81
    path.write_bytes(data)
    source = ShardSource(str(prepared), tokenizer)
    with pytest.raises(UserError, match="train-00000.tokens is damaged"):
        list(source.tokens("train", 0, 0, None))


def test_a_disk_that_goes_away_is_waited_for(prepared, tokenizer, monkeypatch):
    away = prepared.with_name("away")
    source = open_source(parse_specs([f"shards:{prepared}"])[0], tokenizer, 0.0, BadRows("shards"))
    reading = source.tokens("train", 0, 0, None)
    read = [next(reading)[0]]
    prepared.rename(away)
    monkeypatch.setattr(retry.time, "sleep", lambda _: away.rename(prepared))
    read += [ids for ids, _ in reading]
    assert list(map(tokenizer.decode, read)) == documents(prepared, tokenizer, "train")
    prepared.rename(away)
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=f"--data shards:{prepared}: given up after 10 attempts"):
        next(source.tokens("train", 0, 1, None))


def test_a_shard_that_is_cut_short_under_its_reader_is_an_error_not_a_crash(prepared, tokenizer):
    reading = ShardSource(str(prepared), tokenizer).tokens("train", 0, 0, None)
    next(reading)
    for shard in prepared.glob("train-*.tokens"):
        os.truncate(shard, 8)
    with pytest.raises(OSError, match="cut short while it is read.*tokens"):
        list(reading)
