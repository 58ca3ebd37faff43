"""The module finds the pre-tokenizer of llama.cpp that splits text as a tokenizer does.

llama.cpp knows patterns by the name of a model that has them. Which one a tokenizer needs shows in
the ids that it makes of texts on which the patterns differ, whatever the tokenizer calls itself.
"""

import json
from typing import NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from hamner.data.tokenizer import SPLIT_PATTERN, Tokenizer
from hamner.errors import UserError
from hamner.export.tokenizer import (
    HARD_TEXTS,
    MARKED_TEXTS,
    exported_definition,
    first_difference,
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """A pre-tokenizer is what llama.cpp does by one of its names."""

    name: str
    patterns: tuple[str, ...]
    """split the text, one after the other"""
    ignore_merges: bool = False
    """whether whole words are looked up before they are merged"""

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The method makes the same for the library."""
        splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in self.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, to_bytes])


PRE_TOKENIZERS = (
    PreTokenizer("smaug-bpe", (_LLAMA3,)),
    PreTokenizer("llama-bpe", (_LLAMA3,), ignore_merges=True),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("qwen2", (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),)),
)


def find_pre_tokenizer(tokenizer: Tokenizer, *, is_chat: bool) -> str:
    """The function names what gives the ids of training, in conversations too if it `is_chat`.

    Raises:
        UserError: llama.cpp has nothing that does.
    """
    definition = exported_definition(tokenizer)
    model = definition["model"]
    texts = HARD_TEXTS + MARKED_TEXTS
    if SPLIT_PATTERN in _patterns(definition):
        # Nothing of llama.cpp's keeps combining marks in the word, as ours does; that is accepted.
        texts = HARD_TEXTS
    ours = tokenizers.Tokenizer.from_str(json.dumps(definition)).pre_tokenizer
    for candidate in PRE_TOKENIZERS if "merges" in model and ours is not None else ():
        theirs = candidate.build()
        # The pieces first: in a small vocabulary other ones may happen to have the same ids.
        if candidate.ignore_merges != bool(model.get("ignore_merges")) or any(
            ours.pre_tokenize_str(text) != theirs.pre_tokenize_str(text) for text in texts
        ):
            continue
        backend = _without_steps(definition)
        backend.pre_tokenizer = theirs
        if first_difference(tokenizer, backend, texts, is_chat=is_chat) is None:
            return candidate.name
    names = ", ".join(candidate.name for candidate in PRE_TOKENIZERS)
    raise UserError(
        f"--to gguf: the tokenizer {tokenizer.name} splits text as none of llama.cpp's "
        f"pre-tokenizers {names} does; use --to hf, and llama.cpp's convert_hf_to_gguf.py on the "
        "result"
    )


def _patterns(definition: dict) -> list[str]:
    """The patterns are those that a definition in several steps splits text by."""
    steps = (definition.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return [step.get("pattern", {}).get("Regex") for step in steps]


def _without_steps(definition: dict) -> tokenizers.Tokenizer:
    """The tokenizer has of a definition what a GGUF file has: tokens and merges."""
    names = ("vocab", "merges", "ignore_merges")
    model = {name: definition["model"][name] for name in names if name in definition["model"]}
    unset = {"normalizer": None, "pre_tokenizer": None, "model": {"type": "BPE", **model}}
    return tokenizers.Tokenizer.from_str(json.dumps(definition | unset))
