import json
import subprocess
import sys
import threading

import pytest
import torch

from hamner.data.documents import split_of
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError

TEXTS = [f"Document {i} says {' '.join(str(i * j) for j in range(i % 29))}." for i in range(400)]


@pytest.fixture
def corpus(write_jsonl):
    return str(write_jsonl("corpus.jsonl", TEXTS))


def config(*specs, seq_len=32, batch_size=4, seed=0, val_fraction=0.1):
    return DataConfig(specs, seq_len, batch_size, seed, val_fraction)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def flat(batches, field="inputs"):
    return torch.cat([getattr(batch, field).reshape(-1) for batch in batches]).tolist()


def equal(a, b):
    return all(
        torch.equal(getattr(a, f), getattr(b, f)) for f in ("inputs", "targets", "document_ids")
    )


@pytest.fixture
def loader_of(tokenizer):
    """Makes loaders that are closed with the test."""
    loaders = []

    def make(config, **options):
        loaders.append(TrainLoader(config, options.pop("tokenizer", tokenizer), **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def test_targets_are_the_next_tokens_and_documents_are_whole(corpus, loader_of, tokenizer):
    batches = take(loader_of(config(corpus)), 300)
    inputs, targets = flat(batches), flat(batches, "targets")
    assert targets[:-1] == inputs[1:]
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape == batch.document_ids.shape == (4, 32)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.document_ids.dtype == torch.int32
        after_end = (batch.inputs[:, :-1] == tokenizer.eot_id).int()
        assert torch.equal(batch.document_ids[:, 1:], after_end.cumsum(1).int())
    train = [text for text in TEXTS if split_of(text, 0.1) == "train"]
    ends = [i for i, token in enumerate(inputs) if token == tokenizer.eot_id][: len(train)]
    begins = [0, *(end + 1 for end in ends)]
    decoded = [tokenizer.decode(inputs[a:b]) for a, b in zip(begins, ends, strict=False)]
    assert sorted(decoded) == sorted(train)


@pytest.mark.parametrize("stop", [0, 1, 7, 60])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(4, 32), (2, 32), (3, 50)])
def test_resumes_with_the_next_token(corpus, loader_of, write_jsonl, stop, batch_size, seq_len):
    other = str(write_jsonl("other.jsonl", [f"other {i}" for i in range(30)]))
    specs = (f"{corpus}=0.7", f"{other}=0.3")
    first = loader_of(config(*specs))
    before = take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = loader_of(config(*specs, batch_size=batch_size, seq_len=seq_len))
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict()
    assert second.progress() == first.progress()
    # `first` has prefetched and goes on; both must see the same tokens from here.
    expected = flat(take(first, 40), "targets")
    again = flat(take(second, 20), "targets")
    assert again == expected[: len(again)]
    if (batch_size, seq_len) == (4, 32) and stop == 60:
        whole = take(loader_of(config(*specs)), 100)
        assert flat(whole) == flat(before) + flat(whole[60:])


def test_tensors_share_no_memory(corpus, loader_of):
    batch, other = take(loader_of(config(corpus)), 2)
    inputs, following = batch.inputs.clone(), other.inputs.clone()
    batch.targets.fill_(-100)
    assert torch.equal(batch.inputs, inputs) and torch.equal(other.inputs, following)


def test_weights_are_shares_of_tokens(corpus, loader_of, write_jsonl):
    other = str(write_jsonl("other.jsonl", ["a short one", "another one", "and a third"]))
    loader = loader_of(config(f"{corpus}=3", f"{other}=1", val_fraction=0.0))
    take(loader, 50)
    progress = loader.progress()
    shares = [progress[spec]["tokens"] for spec in (corpus, other)]
    assert shares[1] / sum(shares) == pytest.approx(0.25, abs=0.02)
    assert progress[other]["epochs"] > 10
    assert (progress[other]["documents"] - 1) // 3 == progress[other]["epochs"]


def test_a_resumed_run_says_which_source_was_lost(corpus, loader_of, write_jsonl, caplog):
    other = str(write_jsonl("other.jsonl", ["a short one", "another one", "and a third"]))
    specs = (f"{corpus}=1", f"{other}=1")
    first = loader_of(config(*specs))
    take(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    state["position"]["documents"]["lost"][1] = 10
    second = loader_of(config(*specs))
    second.load_state_dict(state)
    assert f"--data {other}: was lost before; still going on without it" in caplog.text
    assert [counts["lost"] for counts in second.progress().values()] == [False, True]


def test_empty_documents_are_skipped_and_counted(loader_of, write_jsonl):
    path = str(write_jsonl("a.jsonl", ["", "text to learn from", "  \n", "more of it"]))
    loader = loader_of(config(path, seq_len=8, batch_size=1, val_fraction=0.0))
    take(loader, 30)
    counts = loader.progress()[path]
    assert counts["skipped"] >= 2 * counts["epochs"] > 0
    assert (counts["documents"] - 1) // 2 == counts["epochs"]


def test_error_arrives_at_its_batch(tmp_path, loader_of):
    rows = [json.dumps(text) for text in TEXTS]
    (tmp_path / "a").mkdir()
    for name in ("1", "2"):
        (tmp_path / "a" / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    good = take(loader_of(config(str(tmp_path / "a"))), 300)
    # Whichever file comes second in the first epoch gets broken; the first is still read.
    order = []
    for name in ("1", "2"):
        path = tmp_path / "a" / f"{name}.jsonl"
        path.write_text("\n".join([*rows, "{"]), encoding="utf-8")
        loader, count = loader_of(config(str(tmp_path / "a"))), 0
        with pytest.raises(UserError, match=f"{name}.jsonl, line 401: not JSON"):
            for batch in loader:
                assert equal(batch, good[count])
                count += 1
        with pytest.raises(UserError, match="line 401"):
            next(loader)
        order.append(count)
        path.write_text("\n".join(rows), encoding="utf-8")
    assert min(order) == 0 < 50 < max(order)


def test_source_without_training_documents_is_refused(tmp_path, loader_of):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="empty.txt: no document to train on"):
        next(loader_of(config(str(tmp_path / "empty.txt"))))


def test_state_of_other_data_is_refused(corpus, loader_of, write_jsonl):
    state = loader_of(config(corpus)).state_dict()
    other = str(write_jsonl("other.jsonl", ["x"]))
    other_tokenizer = load_tokenizer(vocab_size=600)
    cases = [
        (
            config(corpus),
            {"tokenizer": other_tokenizer},
            "the tokenizer .*--vocab-size.* now it is",
        ),
        (config(corpus, seed=1), {}, "--seed 0, now it is 1"),
        (config(corpus, val_fraction=0.2), {}, "validation fraction of 0.1, now it is 0.2"),
        (config(corpus, other), {}, "saved with: .*corpus.jsonl=1 .* then, .*other"),
        (config(other), {}, "saved with: .*corpus.* then, .*other.* now"),
        (config(f"{corpus}=2"), {}, "saved with: .*corpus.jsonl=1 .* then, .*corpus.jsonl=2 "),
    ]
    for changed, options, message in cases:
        with pytest.raises(UserError, match=f"--resume: .*{message}"):
            loader_of(changed, **options).load_state_dict(state)
    write_jsonl("corpus.jsonl", TEXTS[1:])
    with pytest.raises(UserError, match="--data is not what the run was saved with: .*bytes"):
        loader_of(config(corpus)).load_state_dict(state)
    with pytest.raises(UserError, match="format 0"):
        loader_of(config(corpus)).load_state_dict({**state, "version": 0})


def test_state_is_loaded_before_the_first_batch(corpus, loader_of):
    loader = loader_of(config(corpus))
    next(loader)
    with pytest.raises(RuntimeError, match="before the first batch"):
        loader.load_state_dict(loader.state_dict())


def test_close_ends_the_thread(corpus, loader_of):
    loader = loader_of(config(corpus))
    next(loader)
    assert any(thread.name == "hamner-data" for thread in threading.enumerate())
    loader.close()
    loader.close()
    assert not any(thread.name == "hamner-data" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_process_ends_without_close(corpus):
    code = (
        "from hamner.data.loader import *\nfrom hamner.data.tokenizer import load_tokenizer\n"
        f"config = DataConfig(({corpus!r},), 8, 1, 0)\n"
        "loader = TrainLoader(config, load_tokenizer(vocab_size=512))\n"
        "next(loader)\nprint('one batch')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "one batch\n", "")


def test_validation_is_what_training_leaves_out(corpus, tokenizer):
    rows = TrainLoader(config(corpus, batch_size=1), tokenizer).validation_rows(10**6)
    again = TrainLoader(config(corpus, seed=5), tokenizer).validation_rows(10**6)
    assert equal(rows, again)
    inputs = rows.inputs.reshape(-1)
    assert torch.equal(rows.targets.reshape(-1)[:-1], inputs[1:])
    held_out = [text for text in TEXTS if split_of(text, 0.1) == "validation"]
    texts = tokenizer.decode(inputs.tolist()).split("<|endoftext|>")
    assert set(texts[:-1]) <= set(held_out)
    assert len(held_out) - 3 <= len(texts) <= len(held_out) + 1


def test_validation_is_of_every_source_by_its_weight(corpus, write_jsonl, tokenizer):
    other = str(write_jsonl("other.jsonl", [f"other {i}" for i in range(9000)]))
    rows = TrainLoader(config(f"{corpus}=3", f"{other}=1"), tokenizer).validation_rows(2000)
    texts = tokenizer.decode(rows.inputs.flatten().tolist()).split("<|endoftext|>")[:-1]
    sizes = {True: 0, False: 0}
    for text in texts:
        sizes[text.startswith("other")] += len(tokenizer.encode(text)) + 1
    assert sizes[True] / sum(sizes.values()) == pytest.approx(0.25, abs=0.04)


def test_validation_is_no_larger_than_asked(corpus, tokenizer):
    few = TrainLoader(config(corpus), tokenizer).validation_rows(100)
    assert few.inputs.shape == (3, 32)
    many = TrainLoader(config(corpus), tokenizer).validation_rows(10**6)
    assert torch.equal(many.inputs[:3], few.inputs)


def test_corpus_too_small_for_validation_gives_no_rows(write_jsonl, corpus, tokenizer):
    path = str(write_jsonl("a.jsonl", ["a single document"]))
    for empty in (
        TrainLoader(config(path, val_fraction=0.001), tokenizer).validation_rows(1000),
        TrainLoader(config(corpus, val_fraction=0.0), tokenizer).validation_rows(1000),
        TrainLoader(config(corpus), tokenizer).validation_rows(31),
    ):
        assert empty.inputs.shape == empty.targets.shape == empty.document_ids.shape == (0, 32)
        assert (empty.inputs.dtype, empty.document_ids.dtype) == (torch.int64, torch.int32)


def test_builtin_corpus_trains_and_validates(loader_of, tokenizer):
    loader = loader_of(config(val_fraction=0.01))
    next(loader)
    assert list(loader.progress()) == ["builtin"]
    assert len(TrainLoader(config(val_fraction=0.01), tokenizer).validation_rows(2000).inputs) > 0


@pytest.mark.gpu
def test_pinned_batches(corpus, loader_of):
    batch = next(loader_of(config(corpus), pin_memory=True))
    assert batch.inputs.is_pinned() and batch.targets.is_pinned() and batch.document_ids.is_pinned()
