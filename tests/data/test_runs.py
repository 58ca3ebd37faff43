import json
import re

import pytest
import tokenizers

from hamner.data import runs
from hamner.data.runs import MAX_RUN, parts_of
from hamner.data.tokenizer import SPLIT_PATTERN, Tokenizer


@pytest.mark.parametrize("run", [" ", "\n", " \t", "x", "-", "ä"])
def test_long_runs_are_cut_and_nothing_is_lost(run):
    text = f"before {run * (2 * MAX_RUN // len(run) + 5)} after"
    parts = parts_of(text)
    assert "".join(parts) == text
    assert len(parts) == 3 and max(map(len, parts)) <= MAX_RUN + len("before ")


@pytest.mark.parametrize("text", ["", "a" * 99, "words and words " * (MAX_RUN // 8)])
def test_other_texts_stay_whole(text):
    assert parts_of(text) == [text]


def test_parts_are_encoded_in_their_order(tokenizer, monkeypatch):
    texts = ["short", "a run" + "-" * 21 + "here", "", "a" + " " * 16 + "b", "the end"]
    whole = tokenizer.encode_batch(texts)
    monkeypatch.setattr(runs, "MAX_RUN", 3)
    monkeypatch.setattr(runs, "_LONG_RUN", re.compile(r"\s{3}|(.)\1{2}"))
    cut = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in cut] == texts
    assert cut[0] == whole[0] and cut[3] != whole[3]
    assert tokenizer.encode(texts[3]) == cut[3]


def test_a_run_at_which_the_library_panics_is_encoded():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|endoftext|>": 0, "word": 1, "?": 2}, unk_token="?")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(SPLIT_PATTERN), behavior="removed", invert=True
    )
    tokenizer = Tokenizer(json.dumps(json.loads(backend.to_str())), "words")
    text = "word" + " " * 10_500_000 + "word"
    assert tokenizer.encode(text)[0] == 1 and len(tokenizer.encode_batch([text, "word"])[0]) > 10
