import json
from functools import cache

import pytest
import tokenizers
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from hamner.data.builtin import builtin_documents
from hamner.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from hamner.errors import UserError

FULL = load_tokenizer()
TEXT = [
    "It's 2026, and the cat sat on the mat; the cats sat on 12345 mats.\n\n" * 3,
    "    def f(x):\n        return x + 1  # naïve — 你好 \U0001f600\r\n" * 3,
] * 20


def foreign(path, special_tokens):
    """A byte-level BPE of another layout."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.save(str(path))
    return str(path)


def test_layout_is_special_tokens_then_bytes_then_merges():
    assert FULL.vocab_size == 49_152
    assert [FULL.special_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert FULL.eot_id == 0
    every_character = "".join(map(chr, range(0x800))) + "\U0001f600"
    assert set(_cut(261).encode(every_character)) <= set(range(5, 261))


@pytest.mark.parametrize("vocab_size", [261, 4096, 49_152])
@given(text=st.text())
def test_any_text_round_trips(text, vocab_size):
    tokenizer = _cut(vocab_size)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= i < vocab_size for i in ids)


@cache
def _cut(vocab_size):
    return load_tokenizer(vocab_size=vocab_size)


def test_cut_is_what_training_to_that_size_gives():
    texts = builtin_documents()[:100]
    small, large = train_tokenizer(texts, 600), train_tokenizer(texts, 1200)
    assert large.fingerprint != small.fingerprint
    assert large.cut(600).fingerprint == small.fingerprint


def test_text_of_special_tokens_is_ordinary_text(tmp_path):
    FULL.save(tmp_path / "tokenizer.json")
    for tokenizer in (FULL, load_tokenizer(str(tmp_path / "tokenizer.json")), _cut(4096)):
        for name in SPECIAL_TOKENS:
            text = f"before {name}after"
            for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
                assert min(ids) >= len(SPECIAL_TOKENS)
                assert tokenizer.decode(ids) == text


def test_digits_are_grouped_by_threes_and_words_keep_one_space():
    pieces = [FULL.decode([i]) for i in FULL.encode("1234567  the the")]
    assert pieces == ["123", "456", "7", " ", " the", " the"]


def test_encode_batch_equals_encode():
    texts = ["", "a", *TEXT]
    assert FULL.encode_batch(texts) == [FULL.encode(text) for text in texts]


def test_fingerprint_names_the_definition(tmp_path):
    FULL.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path)).fingerprint == FULL.fingerprint
    assert _cut(4096).fingerprint != FULL.fingerprint
    definition = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    reordered = dict(sorted(definition.items(), reverse=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(reordered, indent=2))
    assert load_tokenizer(str(tmp_path)).fingerprint == FULL.fingerprint
    definition["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert load_tokenizer(str(tmp_path)).fingerprint != FULL.fingerprint


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_foreign_tokenizer_ends_documents_with_its_own_token(tmp_path, end):
    tokenizer = load_tokenizer(foreign(tmp_path / "tokenizer.json", ["<pad>", end]))
    assert tokenizer.eot_id == 1
    assert tokenizer.decode(tokenizer.encode(f"the cat {end}")) == f"the cat {end}"
    with pytest.raises(UserError, match=r"<\|user\|>"):
        tokenizer.special_id("<|user|>")


def test_foreign_tokenizer_without_end_token_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token that ends a document"):
        load_tokenizer(foreign(tmp_path / "tokenizer.json", ["<pad>"]))


def test_foreign_tokenizer_is_never_cut(tmp_path):
    path = foreign(tmp_path / "tokenizer.json", ["</s>"])
    with pytest.raises(UserError, match="--vocab-size 300 or more"):
        load_tokenizer(path, vocab_size=280)
    assert load_tokenizer(path, vocab_size=50_000).vocab_size == 300


def test_vocabulary_must_hold_the_bytes():
    with pytest.raises(UserError, match="need 261"):
        load_tokenizer(vocab_size=260)


def test_training_on_too_little_text_is_refused():
    with pytest.raises(UserError, match="only yields"):
        train_tokenizer(["a b c"], 5000)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"model": 1}), "\x00"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match="--tokenizer .*not a tokenizer.json"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["missing.json", "folder/missing.json", "typo", "a/b/c"])
def test_missing_file_is_refused_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=f"--tokenizer {name}: no such file"):
        load_tokenizer(name)


def test_hub_name_is_downloaded(monkeypatch, tmp_path):
    FULL.save(tmp_path / "tokenizer.json")
    asked = []

    def download(*arguments):
        asked.append(arguments)
        return str(tmp_path / "tokenizer.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert isinstance(load_tokenizer("owner/name"), Tokenizer)
    assert asked == [("owner/name", "tokenizer.json")]


@pytest.mark.parametrize(
    ("error", "message"),
    [(LocalEntryNotFoundError("offline"), "cannot be reached"), (OSError("404"), "no tokenizer")],
)
def test_hub_typo_or_no_network_is_one_sentence(monkeypatch, error, message):
    def download(*arguments):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=f"--tokenizer owner/name: .*{message}"):
        load_tokenizer("owner/name")
