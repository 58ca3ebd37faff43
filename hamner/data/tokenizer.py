"""The tokenizer is byte-level BPE, ours or a foreign `tokenizer.json`.

Layout of ours: the special tokens at ids 0-4, the 256 bytes, then the merges in the order they
were learnt. So the first n ids are themselves a byte-level BPE, the one that training with
`vocab_size=n` on the same text gives, and small models use the same file with a cut.
"""

import contextlib
import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hamner.data.reserved import inside_definition, reserved_tokens, text_definition
from hamner.data.runs import encode_in_parts, parts_of
from hamner.errors import UserError
from hamner.files import parse_json, refuse_pipe, write_whole

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCAB_SIZE = 49_152
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

#: What ends a document in foreign tokenizers without `<|endoftext|>`.
FOREIGN_END_OF_TEXT = ("<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[EOS]", "[SEP]")

#: Contractions; letters with at most one leading space or sign; digits by threes; punctuation with
#: its line ends; line ends; other spaces, of which the last one stays with the word that follows.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


class Tokenizer:
    """A tokenizer turns text into token ids and back.

    Args:
        definition: content of a `tokenizer.json`.
        name: in messages, as the user wrote it.

    Raises:
        UserError: not a definition, without a token that ends a document, or one with which text
            could become such a token.

    The text of reserved tokens inside a document is ordinary text: encoding never gives a reserved
    id (`hamner.data.reserved`). They are written by the code that means them (`eot_id`,
    `special_id`).

    Attributes:
        vocab_size: the largest id plus one.
        eot_id: id of the token that ends a document.
        definition: content of the `tokenizer.json`, parsed.
        reserved: names of the tokens that text never becomes.
        text_tags: whether a conversation's tags, such as `<|user|>`, are spelled in ordinary text;
            see `hamner.data.chat_template`.
    """

    text_tags = False

    def __init__(self, definition: str, name: str) -> None:
        with _refused(f"--tokenizer {name}: not a tokenizer.json"):
            self.definition: dict = parse_json(definition)
            self._backend = _backend(definition)
            vocab = self._backend.get_vocab(with_added_tokens=True)
            self.vocab_size: int = max(vocab.values()) + 1
        self.name = name
        eot = next((end for end in (END_OF_TEXT, *FOREIGN_END_OF_TEXT) if end in vocab), None)
        if eot is None:
            raise UserError(
                f"--tokenizer {name}: it has no token that ends a document, neither "
                f"{END_OF_TEXT} nor any of {' '.join(FOREIGN_END_OF_TEXT)}"
            )
        self.eot_id: int = vocab[eot]
        written = {eot, *(token for token in SPECIAL_TOKENS if token in vocab)}
        with _refused(f"--tokenizer {name}: text cannot be kept from becoming its special tokens"):
            self.reserved: set[str] = reserved_tokens(self.definition, written)
            self._text_definition = text_definition(self.definition, self.reserved, written)
            self._encoder = self._backend
            if self._text_definition is not None:
                self._encoder = _backend(json.dumps(self._text_definition))
            ids = {vocab[token] for token in self.reserved}
            for token, token_id in vocab.items():
                if token_id in ids and token not in self.reserved:
                    raise ValueError(f"{token!r} has the id of one")

    @functools.cached_property
    def _inside_encoder(self) -> tokenizers.Tokenizer:
        inside = inside_definition(self._text_definition or self.definition)
        return self._encoder if inside is None else _backend(json.dumps(inside))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints give equal ids: SHA-256 of the definition, however it is laid out."""
        # Of the file, not of `backend.to_str()`, which changes with the library's version.
        canonical = json.dumps(self.definition, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_inside(self, text: str) -> list[int]:
        """The text follows a reserved token, as in a conversation: it does not begin a text."""
        return self._encode(self._inside_encoder, [text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The texts are encoded on all cores and without the GIL."""
        return self._encode(self._encoder, texts)

    def _encode(self, encoder: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        def encode_parts(parts: list[str]) -> list[list[int]]:
            encodings = encoder.encode_batch_fast(parts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

        with _refused(f"--tokenizer {self.name}: it cannot encode"):
            return encode_in_parts(encode_parts, texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The ids are given as text, special tokens spelled out."""
        with _refused(f"--tokenizer {self.name}: it cannot decode"):
            return self._backend.decode(list(ids), skip_special_tokens=False)

    def text_of(self, token_id: int) -> str:
        """The text is how the vocabulary spells one id."""
        return self._backend.id_to_token(token_id)

    def special_id(self, name: str) -> int:
        """`special_id` finds the id of a special token such as `<|user|>`.

        Raises:
            UserError: the tokenizer has no such token.
        """
        token_id = self._backend.token_to_id(name)
        if token_id is None:
            raise UserError(
                f"--tokenizer {self.name}: it has no special token {name}, which conversations "
                "need; a run from its weights can have one: hamner.train --init-from RUN "
                "--reserve-chat-tokens"
            )
        return token_id

    def with_text_tags(self) -> "Tokenizer":
        """The tokenizer is this one for a model that read its conversations' tags as text."""
        tokenizer = copy.copy(self)
        tokenizer.text_tags = True
        return tokenizer

    def save(self, path: Path) -> None:
        """The definition is written as a `tokenizer.json`."""
        write_definition(path, self.definition)

    def cut(self, vocab_size: int | None) -> "Tokenizer":
        """The tokenizer is that of the first `vocab_size` ids, this one if it has no more.

        Raises:
            UserError: the vocabulary is too small, or not laid out as ours.
        """
        if vocab_size is None or vocab_size >= self.vocab_size:
            return self
        head = [self._backend.id_to_token(i) for i in range(MIN_VOCAB_SIZE)]
        has_our_layout = (
            isinstance(self._backend.model, models.BPE)
            and tuple(head[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS
            and set(head[len(SPECIAL_TOKENS) :]) == set(pre_tokenizers.ByteLevel.alphabet())
        )
        if not has_our_layout:
            raise UserError(
                f"--tokenizer {self.name} has {self.vocab_size:,} entries and cannot be cut: "
                f"use --vocab-size {self.vocab_size} or more"
            )
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"--vocab-size {vocab_size}: the special tokens and the 256 bytes need "
                f"{MIN_VOCAB_SIZE}"
            )
        model = self.definition["model"]
        vocab, merges = model["vocab"], model["merges"]
        # A merge may spell a token that an earlier one made, so ids do not count merges: all
        # merges up to the first token that falls away are kept.
        kept = next(
            (i for i, pair in enumerate(merges) if vocab["".join(pair)] >= vocab_size), len(merges)
        )
        vocab = {token: i for token, i in vocab.items() if i < vocab_size}
        model = model | {"vocab": vocab, "merges": merges[:kept]}
        return Tokenizer(json.dumps(self.definition | {"model": model}), self.name)


def write_definition(path: Path, definition: dict) -> None:
    """The function writes a `tokenizer.json`."""
    write_whole(path, json.dumps(definition, ensure_ascii=False, separators=(",", ":")))


class StreamDecoder:
    """A stream decoder gives the text of ids that come one by one: a character whose bytes are
    spread over several tokens is given out once, when it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer._backend
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._given = 0

    def step(self, token_id: int) -> str:
        """The text is what `token_id` completes, perhaps none."""
        self._ids.append(token_id)
        piece = self._stream.step(self._backend, token_id) or ""
        self._given += len(piece)
        return piece

    def finish(self) -> str:
        """The rest is what is left at the end; bytes that make no character become U+FFFD."""
        whole = self._backend.decode(self._ids, skip_special_tokens=False)
        return whole[self._given :]


def _backend(definition: str) -> tokenizers.Tokenizer:
    """The library's tokenizer spells special tokens out, cuts no text, and draws no lots."""
    backend = tokenizers.Tokenizer.from_str(definition)
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """What the library raises, bare exceptions and its panics, becomes a `UserError`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} ({reason})") from error


def load_tokenizer(
    name: str = "builtin", vocab_size: int | None = None, *, text_tags: bool = False
) -> Tokenizer:
    """`load_tokenizer` finds a tokenizer by name.

    Args:
        name: "builtin" (the one that Hamner ships), the path of a `tokenizer.json`, or the name of
            a Hugging Face repository, `owner/name`.
        vocab_size: size of the model's vocabulary. Ours is cut when it is larger than that; one
            that is smaller leaves the last rows of the embedding unused.
        text_tags: whether the model read the tags of conversations as ordinary text.

    Raises:
        UserError: no such tokenizer, not a tokenizer, or one that does not fit `vocab_size`.
    """
    if name == "builtin":
        tokenizer = _builtin(vocab_size)
    else:
        tokenizer = Tokenizer(_read_definition(name), name).cut(vocab_size)
    return tokenizer.with_text_tags() if text_tags else tokenizer


@functools.cache
def _builtin(vocab_size: int | None) -> Tokenizer:
    """The tokenizer that Hamner ships takes half a second to load, so it is loaded once."""
    if vocab_size is not None:
        return _builtin(None).cut(vocab_size)
    definition = resources.files("hamner.data").joinpath("tokenizer.json").read_text("utf-8")
    return Tokenizer(definition, "builtin")


def _read_definition(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        if path.suffix == ".json" or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UserError(
                f"--tokenizer {name}: no such file; give 'builtin', the path of a tokenizer.json "
                "or a Hugging Face name owner/name"
            )
        path = _download(name)
    refuse_pipe(path, f"--tokenizer {name}")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tokenizer {name}: cannot be read ({error})") from error


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"--tokenizer {name}: no such file here, and the Hugging Face hub cannot be reached; "
            "go online or give the path of a tokenizer.json"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--tokenizer {name}: no tokenizer.json could be fetched from the Hugging Face hub "
            f"({reason})"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) is learned from documents.

    Raises:
        UserError: the text is too small for so many entries.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in parts_of(text)), trainer)
    tokenizer = Tokenizer(backend.to_str(), "trained")
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the text only yields {tokenizer.vocab_size:,} entries; "
            "give more text or a smaller vocabulary"
        )
    return tokenizer
