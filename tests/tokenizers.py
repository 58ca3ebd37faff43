"""Tokenizers of other people's kinds, made small, as the content of their tokenizer.json."""

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hamner.data.tokenizer import SPECIAL_TOKENS, load_tokenizer

ROLES = SPECIAL_TOKENS[1:]
SPECIAL = ["<unk>", "<s>", "</s>", *ROLES]
TEXT = [
    "It's 2026, and the cat sat on the mat; the cats sat on 12345 mats.\n\n",
    "    def f(x):\n        return x + 1  # naïve — 你好\r\n",
    # So that every character of the special tokens is known.
    "the < / s > and | s y t e m u r a i n d k of [ S E P ] </s> <|end|> <|user|>\n",
] * 20


def _trained(
    model: models.Model, steps: pre_tokenizers.PreTokenizer, trainer: trainers.Trainer
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = steps
    backend.train_from_iterator(TEXT, trainer)
    return backend


def unigram(prepend_scheme: str = "always") -> dict:
    """SentencePiece's kind."""
    steps = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend = _trained(models.Unigram(), steps, trainer)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return json.loads(backend.to_str())


def word_level() -> dict:
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    model = models.WordLevel(unk_token="<unk>")
    return json.loads(_trained(model, pre_tokenizers.WhitespaceSplit(), trainer).to_str())


def word_piece() -> dict:
    """BERT's kind, but for its punctuation."""
    special = ["[UNK]", "[CLS]", "[SEP]", *ROLES]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return json.loads(_trained(model, pre_tokenizers.WhitespaceSplit(), trainer).to_str())


def byte_level(
    special: list[str] = SPECIAL,
    steps: pre_tokenizers.PreTokenizer | None = None,
    *,
    use_regex: bool = True,
    add_prefix_space: bool = False,
) -> dict:
    """GPT-2's kind.

    Args:
        special: its special tokens.
        steps: split the text before.
        use_regex: whether GPT-2's pattern splits it.
        add_prefix_space: whether a text gets a space before it.
    """
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    whole = pre_tokenizers.Sequence([steps, to_bytes]) if steps else to_bytes
    backend = _trained(models.BPE(), whole, trainer)
    backend.decoder = decoders.ByteLevel()
    return json.loads(backend.to_str())


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3(pattern: str = LLAMA_3, *, ignore_merges: bool = True) -> dict:
    """Llama 3's kind, or one with another pattern."""
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    definition = byte_level(SPECIAL, split, use_regex=False)
    definition["model"]["ignore_merges"] = ignore_merges
    return definition


def smollm() -> dict:
    """SmolLM's kind."""
    return byte_level(list(SPECIAL_TOKENS), pre_tokenizers.Digits(individual_digits=True))


def sentence_bpe() -> dict:
    """Llama 2's kind: a space before every text, bytes for characters that are not known."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIAL, *fallback], show_progress=False
    )
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    definition = json.loads(backend.to_str())
    for token in definition["added_tokens"]:
        token["normalized"] = False
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] < len(SPECIAL)]
    return definition


def unmarked() -> dict:
    """Its special tokens are not marked so; another added token is meant to be found in text."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_level(["<unk>"])))
    backend.add_tokens([*SPECIAL[1:3], "    ", *SPECIAL[3:]])
    return json.loads(backend.to_str())


def whole_words() -> dict:
    """It looks whole words up before it merges."""
    definition = byte_level(SPECIAL, pre_tokenizers.Split(" ", "isolated"), use_regex=False)
    definition["model"]["ignore_merges"] = True
    return definition


def merging() -> dict:
    """Its merges lead to a special token."""
    definition = byte_level()
    model = definition["model"]
    for left, right in (("<", "/"), ("</", "s"), ("</s", ">")):
        model["vocab"].setdefault(left + right, len(model["vocab"]))
        model["merges"].append([left, right])
    return definition


def listed() -> dict:
    """Its special tokens are in the vocabulary, but no added tokens."""
    return word_level() | {"added_tokens": []}


def with_begin(definition: dict) -> dict:
    """Its post-processor puts `<s>` before a text, and long texts are cut and filled up."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    begin = ("<s>", backend.token_to_id("<s>"))
    template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [begin]}
    backend.post_processor = processors.TemplateProcessing(**template)
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    return json.loads(backend.to_str())


KINDS: dict[str, Callable[[], dict]] = {
    "unigram": unigram,
    "word level": word_level,
    "word piece": word_piece,
    "byte level": byte_level,
    "sentence bpe": sentence_bpe,
    "unmarked": unmarked,
    "whole words": whole_words,
    "merging": merging,
    "listed": listed,
}


def foreign(folder: Path, reserved: int) -> Path:
    """A tokenizer without tokens of conversations, and with some that no text has."""
    definition = load_tokenizer(vocab_size=300).definition
    text = json.dumps(definition)
    for name in ROLES:
        text = text.replace(name, name.replace("|", "||"))
    foreign = json.loads(text)
    foreign["added_tokens"] = foreign["added_tokens"][: reserved + 1]
    path = folder / "foreign.json"
    path.write_text(json.dumps(foreign))
    return path
