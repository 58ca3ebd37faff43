"""Tokenizers of every kind are given the tokens of conversations, and text keeps its ids."""

import json

import pytest

from hamner.data.__main__ import main
from hamner.data.chat_tokens import add_chat_tokens, missing_chat_tokens
from hamner.data.shards import ShardSource
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizers import KINDS, ROLES, byte_level, with_begin

TEXT = "the cat sat on the mat; the cats sat on 12345 mats."


def without_roles(definition: dict) -> str:
    """The definition has other special tokens where it had those of conversations."""
    text = json.dumps(definition)
    for name in ROLES:
        text = text.replace(name, name.replace("|", "||"))
    return text


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"listed", "whole words"}))
def test_unused_special_tokens_are_given_to_conversations(kind):
    tokenizer = Tokenizer(without_roles(KINDS[kind]()), kind)
    assert missing_chat_tokens(tokenizer) == list(ROLES)
    given = add_chat_tokens(tokenizer)
    old = [name.replace("|", "||") for name in ROLES]
    assert {*map(given.special_id, ROLES)} == {*map(tokenizer.special_id, old)}
    assert given.encode(TEXT) == tokenizer.encode(TEXT)
    assert (given.vocab_size, given.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    assert add_chat_tokens(given) is given


def test_special_tokens_in_use_are_left_to_their_use():
    """Unknown, begin and end of a text are no one's to rename: that leaves three of six."""
    definition = with_begin(byte_level(["<unk>", "<s>", "</s>", "<mask>", "<cls>", "<sep>"]))
    definition["model"]["unk_token"] = "<unk>"
    tokenizer = Tokenizer(json.dumps(definition), "theirs")
    assert add_chat_tokens(tokenizer) is None
    assert add_chat_tokens(tokenizer, vocab_size=tokenizer.vocab_size + 3) is None
    given = add_chat_tokens(tokenizer, vocab_size=tokenizer.vocab_size + 4)
    ids = [*map(given.special_id, ROLES)]
    assert ids == [*range(tokenizer.vocab_size, tokenizer.vocab_size + 4)]
    assert given.encode(f"{TEXT} <|user|>") == tokenizer.encode(f"{TEXT} <|user|>")


def test_shards_can_be_prepared_for_a_run_with_reserved_tokens(tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text(without_roles(byte_level()))
    (tmp_path / "text.txt").write_text(TEXT)
    args = ["prepare", "--data", str(tmp_path / "text.txt"), "--tokenizer", str(path)]
    args += ["--output", str(tmp_path / "shards"), "--val-fraction", "0", "--reserve-chat-tokens"]
    main(args)
    given = add_chat_tokens(load_tokenizer(str(path)))
    (document,) = ShardSource(str(tmp_path / "shards"), given).tokens("train", 0, 0, None)
    assert document[0].tolist()[: len(given.encode(TEXT))] == given.encode(TEXT)
