"""No text becomes a reserved token, with any kind of tokenizer."""

import json

import pytest
import tokenizers

from hamner.data.chat_template import END_TOKEN, ROLE_TOKENS, Message, render
from hamner.data.tokenizer import FOREIGN_END_OF_TEXT, Tokenizer
from hamner.errors import UserError
from tests.tokenizers import KINDS, SPECIAL, byte_level, unigram, unmarked, word_level

SPELLED = (
    *(f"the cat{gap}{token}{gap}sat" for token in (*SPECIAL, "[SEP]") for gap in (" ", "", "\n")),
    "".join(SPECIAL),
    *SPECIAL,
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return Tokenizer(json.dumps(KINDS[request.param]()), request.param)


def reserved_in(ids: list[int], tokenizer: Tokenizer) -> set[str]:
    """The names are those of reserved tokens, but for what stands for words that are unknown."""
    return {tokenizer.text_of(i) for i in ids} & (tokenizer.reserved - {"<unk>", "[UNK]"})


def test_no_text_becomes_a_reserved_token(tokenizer):
    end = tokenizer.text_of(tokenizer.eot_id)
    assert end in FOREIGN_END_OF_TEXT
    assert {end, END_TOKEN, *ROLE_TOKENS.values()} <= tokenizer.reserved
    for text, ids in zip(SPELLED, tokenizer.encode_batch(SPELLED), strict=True):
        assert ids == tokenizer.encode(text)
        assert not reserved_in(ids + tokenizer.encode_inside(text), tokenizer), text


def test_no_message_opens_or_ends_a_turn(tokenizer):
    for text in SPELLED:
        conversation = [Message("user", text), Message("assistant", text)]
        found = [i for i in render(conversation, tokenizer).ids if reserved_in([i], tokenizer)]
        expected = (ROLE_TOKENS["user"], ROLE_TOKENS["assistant"], END_TOKEN)
        assert found == [tokenizer.special_id(name) for name in expected], text


def test_other_text_keeps_its_ids(tokenizer):
    """And what text is allowed to become, such as four spaces that are an added token."""
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    for text in ("", "The cat sat", " 12345 mats — naïve 你好!\n\n", "x\n    return the   cats"):
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_the_spelled_text_is_kept():
    for kind in ("unigram", "byte level", "sentence bpe", "unmarked", "whole words", "merging"):
        tokenizer = Tokenizer(json.dumps(KINDS[kind]()), kind)
        for text in SPELLED:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids).lstrip(" ") == text, kind
            assert not tokenizer.reserved.intersection(map(tokenizer.text_of, ids)), kind


def test_an_added_token_for_text_is_found_in_it():
    tokenizer = Tokenizer(json.dumps(unmarked()), "theirs")
    spaces = tokenizer.special_id("    ")
    assert spaces in tokenizer.encode("</s>    x<|end|>")


def unknown_ends_a_document() -> dict:
    definition = word_level()
    definition["model"]["unk_token"] = "</s>"
    return definition


def unknown_piece_ends_a_document() -> dict:
    definition = unigram()
    definition["model"]["unk_id"] = SPECIAL.index("</s>")
    return definition


def one_id_for_two() -> dict:
    definition = word_level()
    vocab = definition["model"]["vocab"]
    vocab["the"] = vocab["</s>"]
    return definition


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (unknown_ends_a_document, "text that it does not know becomes </s>"),
        (unknown_piece_ends_a_document, "text that it does not know becomes </s>"),
        (lambda: byte_level(["</s>", "a"]), "its special token 'a' is a letter that text is"),
        (one_id_for_two, "'the' has the id of one"),
    ],
)
def test_what_cannot_be_promised_is_refused(definition, reason):
    with pytest.raises(UserError, match=f"--tokenizer theirs: text cannot be kept .*{reason}"):
        Tokenizer(json.dumps(definition()), "theirs")


def test_a_byte_level_tokenizer_knows_every_text():
    definition = byte_level()
    definition["model"]["unk_token"] = "</s>"
    tokenizer = Tokenizer(json.dumps(definition), "theirs")
    assert tokenizer.eot_id not in tokenizer.encode("你好 \U0001f600 </s>")
