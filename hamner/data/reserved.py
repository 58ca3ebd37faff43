"""The module keeps text from becoming a reserved token, whatever the tokenizer.

Reserved tokens mean what no text can say: the end of a document, whose turn it is. The library
spells them out in text where they are added tokens marked special and the model itself cannot make
them. Where that is not so, text is encoded by another definition: there, reserved tokens have names
that no text has, no merge makes them, and all are marked special. Ids stay as they are.
"""

import json
import re
import secrets
from collections.abc import Collection

from tokenizers import pre_tokenizers

#: Added tokens of these names are reserved even if they are not marked special.
_CONTROL = re.compile(
    r"<\|.+\|>|</?s>|<(bos|eos|pad|unk|mask|cls|sep)>|\[(BOS|EOS|PAD|UNK|MASK|CLS|SEP)\]"
)


def reserved_tokens(definition: dict, written: Collection[str]) -> set[str]:
    """The names are those of all tokens that text must not become.

    Args:
        definition: content of a `tokenizer.json`.
        written: tokens that Hamner itself writes between texts.
    """
    added = definition.get("added_tokens") or []
    marked = (t["content"] for t in added if t["special"] or _CONTROL.fullmatch(t["content"]))
    # What stands for a byte stands for text.
    return set(written).union(marked) - _bytes_of_fallback(definition["model"])


def text_definition(definition: dict, reserved: set[str], written: Collection[str]) -> dict | None:
    """The definition encodes text without ever giving a reserved token, but for an unknown word's.

    Returns:
        None where the tokenizer's own does that, once the library spells out special tokens.

    Raises:
        ValueError: half a sentence says why there is none.
    """
    model = definition["model"]
    unknown = _unknown_token(model)
    if unknown in written and not _spells_every_byte(definition):
        raise ValueError(
            f"text that it does not know becomes {unknown}, which has a meaning of its own here"
        )
    made = _made_from_text(model, reserved)
    unmarked = [
        token
        for token in definition.get("added_tokens") or []
        if token["content"] in reserved and not token["special"]
    ]
    if not made and not unmarked:
        return None
    # Random, so that no text has it as a word.
    names = {name: f"{name} {secrets.token_hex(16)}" for name in made}
    added = [
        token | {"special": token["special"] or token["content"] in reserved}
        for token in definition.get("added_tokens") or []
        if token["content"] not in names
    ]
    return definition | {"added_tokens": added, "model": _renamed(model, names)}


def inside_definition(definition: dict) -> dict | None:
    """The definition encodes text that follows a token, or None where that makes no difference.

    Some tokenizers put a space before a text, but not before what follows a special token in it.
    """
    steps = json.dumps(definition.get("pre_tokenizer"))
    inside = steps.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return None if inside == steps else definition | {"pre_tokenizer": json.loads(inside)}


def _made_from_text(model: dict, reserved: set[str]) -> set[str]:
    """The names are those of reserved tokens that the model gives for their own text.

    Raises:
        ValueError: text could not be spelled without one of them.
    """
    vocab = model["vocab"]
    in_vocab = reserved.intersection(vocab if isinstance(vocab, dict) else (p for p, _ in vocab))
    if "merges" not in model:
        return in_vocab
    made = in_vocab.intersection(_merge(pair, model)[2] for pair in model["merges"])
    prefix, suffix = _affixes(model)
    letters = {n for n in in_vocab if len(n.removeprefix(prefix).removesuffix(suffix)) == 1}
    if letters and not model.get("byte_fallback"):
        raise ValueError(
            f"its special token {min(letters)!r} is a letter that text is spelled with: mark it as "
            "not special"
        )
    return in_vocab if model.get("ignore_merges") else made | letters


def _renamed(model: dict, names: dict[str, str]) -> dict:
    """The model is the same with some of its tokens under other names, and without their merges."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return model | {"vocab": [[names.get(piece, piece), score] for piece, score in vocab]}
    renamed = model | {"vocab": {names.get(token, token): i for token, i in vocab.items()}}
    if model.get("unk_token") in names:
        renamed["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        merges = model["merges"]
        renamed["merges"] = [m for m in merges if not names.keys() & set(_merge(m, model))]
    return renamed


def _merge(pair: str | list[str], model: dict) -> tuple[str, str, str]:
    """The tokens are the two that a merge joins, and what they become."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left, right, left + right[len(_affixes(model)[0]) :]


def _affixes(model: dict) -> tuple[str, str]:
    """The two strings mark that a piece continues a word, and that it ends one."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _unknown_token(model: dict) -> str | None:
    if isinstance(model["vocab"], list):
        unknown = model.get("unk_id")
        return None if unknown is None else model["vocab"][unknown][0]
    return model.get("unk_token")


def _spells_every_byte(definition: dict) -> bool:
    """The answer is whether no text is unknown to a byte-level model, or one that falls back."""
    model = definition["model"]
    vocab = model["vocab"]
    tokens = set(vocab if isinstance(vocab, dict) else (piece for piece, _ in vocab))
    if fallback := _bytes_of_fallback(model):
        return fallback <= tokens
    steps = definition.get("pre_tokenizer") or {}
    is_byte_level = any(
        step["type"] == "ByteLevel" for step in (steps, *steps.get("pretokenizers", ())) if step
    )
    return is_byte_level and "merges" in model and tokens.issuperset(_ALPHABET)


def _bytes_of_fallback(model: dict) -> set[str]:
    """The tokens stand for the bytes of characters that the vocabulary lacks, if it has such."""
    return {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()


_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
