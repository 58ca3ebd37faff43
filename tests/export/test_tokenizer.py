"""An exported tokenizer gives the ids of training to its readers, or is not exported."""

import json
from dataclasses import replace
from functools import partial

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from hamner.data.chat_template import Message, render, render_prompt
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.export.__main__ import ExportConfig, export
from hamner.export.tokenizer import HARD_TEXTS, MARKED_TEXTS
from tests.models import DENSE, build
from tests.saved import save_run
from tests.tokenizers import (
    KINDS,
    LLAMA_3,
    SPECIAL,
    byte_level,
    llama3,
    smollm,
    unigram,
    with_begin,
)

MODEL = build(replace(DENSE, vocab_size=512, num_layers=1))
CONVERSATION = [
    Message("user", "Don't say 2 + 2,\n\nnaïve 你好!"),
    Message("assistant", "4 — four.\n\nOr"),
    Message("user", "the cat?"),
]


def exported(tmp_path, definition: dict, to: str, *, is_chat: bool = True):
    """The path is what a run with that tokenizer is exported to."""
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(definition))
    run = save_run(tmp_path / "run", MODEL, tokenizer=str(path), chat=is_chat)
    return export(ExportConfig(tmp_path / f"out.{to}", to, run))


def dropping() -> dict:
    """It leaves out merges by chance, as some do in training."""
    definition = byte_level()
    definition["model"]["dropout"] = 0.5
    return definition


def greedy(definition: dict) -> dict:
    """Its special tokens take the spaces around them, and stand for whole words."""
    flags = {"lstrip": True, "rstrip": True, "single_word": True, "normalized": True}
    return definition | {"added_tokens": [token | flags for token in definition["added_tokens"]]}


@pytest.mark.parametrize(
    "make",
    [
        *KINDS.values(),
        partial(unigram, "first"),
        partial(byte_level, add_prefix_space=True),
        lambda: with_begin(byte_level()),
        lambda: with_begin(unigram()),
        lambda: greedy(byte_level()),
        dropping,
        lambda: byte_level() | {"normalizer": {"type": "NFC"}},
    ],
)
def test_hugging_face_gives_the_ids_of_training(make, tmp_path):
    definition = make()
    ours = Tokenizer(json.dumps(definition), "theirs")
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, definition, "hf"))
    for text in HARD_TEXTS + MARKED_TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text), text
    turns = [{"role": turn.role, "content": turn.content} for turn in CONVERSATION]
    whole = theirs.apply_chat_template(turns, return_dict=False)
    assert whole == render(CONVERSATION, ours).ids
    prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(CONVERSATION, ours)
    assert theirs.eos_token_id == ours.eot_id


def joining() -> dict:
    """It makes one token of a line break and a digit after it."""
    definition = byte_level(use_regex=False)
    definition["model"]["vocab"]["Ċ4"] = len(definition["model"]["vocab"])
    definition["model"]["merges"].append(["Ċ", "4"])
    return definition


@pytest.mark.parametrize(
    ("make", "is_chat", "reason"),
    [
        (lambda: byte_level([*SPECIAL, "\n\n"]), False, r"has \['\\n\\n', .* where training has"),
        (joining, True, r"has \['Ċ4', .* where training has \['Ċ', '4'"),
    ],
)
def test_other_ids_are_refused(make, is_chat, reason, tmp_path):
    with pytest.raises(UserError, match=f"--to hf: .*other tokens than training did: .*{reason}"):
        exported(tmp_path, make(), "hf", is_chat=is_chat)
    assert not (tmp_path / "out.hf").exists()


def test_a_vocabulary_of_digits_is_compared_on_digits(tmp_path):
    vocab = {character: i for i, character in enumerate("0123456789+=;")} | {"</s>": 13}
    backend = Backend(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    folder = exported(tmp_path, json.loads(backend.to_str()), "hf", is_chat=False)
    assert AutoTokenizer.from_pretrained(folder)("1+2=3;")["input_ids"] == [1, 10, 2, 11, 3, 12]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (smollm, "smollm"),
        (byte_level, "gpt-2"),
        (KINDS["unmarked"], "gpt-2"),
        (lambda: with_begin(byte_level()), "gpt-2"),
        (llama3, "llama-bpe"),
        (partial(llama3, ignore_merges=False), "smaug-bpe"),
        (partial(llama3, LLAMA_3.replace("{1,3}", ""), ignore_merges=False), "qwen2"),
    ],
)
def test_gguf_names_the_pre_tokenizer_that_splits_as_training_did(make, name, tmp_path):
    """llama.cpp itself was seen to give these ids; here, only that the name is the right one."""
    definition = make()
    fields = gguf.GGUFReader(exported(tmp_path, definition, "gguf")).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    ours = Tokenizer(json.dumps(definition), "theirs")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: ours.vocab_size] == [ours.text_of(i) for i in range(ours.vocab_size)]
    kinds = dict(zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True))
    assert {name for name, kind in kinds.items() if kind == gguf.TokenType.CONTROL} == ours.reserved
    spaces = gguf.TokenType.USER_DEFINED if make is KINDS["unmarked"] else None
    assert kinds.get("    ") == spaces


@pytest.mark.parametrize(
    "make",
    [
        unigram,
        partial(byte_level, add_prefix_space=True),
        lambda: byte_level() | {"normalizer": {"type": "NFC"}},
        partial(llama3, r"\S+|\s+"),
        partial(byte_level, [*SPECIAL, "\n\n"]),
    ],
)
def test_what_llama_cpp_would_split_otherwise_is_refused(make, tmp_path):
    with pytest.raises(
        UserError, match=r"--to gguf: .*none of llama.cpp's pre-tokenizers .*smollm"
    ):
        exported(tmp_path, make(), "gguf")
    assert not (tmp_path / "out.gguf").exists()
