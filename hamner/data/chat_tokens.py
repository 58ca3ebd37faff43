"""The tokens of conversations are given to a tokenizer of another kind."""

import json

import tokenizers

from hamner.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from hamner.errors import UserError


def missing_chat_tokens(tokenizer: Tokenizer) -> list[str]:
    """The list names the tokens of conversations that the tokenizer does not have."""
    return [name for name in SPECIAL_TOKENS[1:] if name not in tokenizer.reserved]


def add_chat_tokens(tokenizer: Tokenizer, vocab_size: int | None = None) -> Tokenizer | None:
    """The function adds the tokens that conversations need, or returns None without room for them.

    No id of the text changes. A tokenizer of another kind often reserves special tokens that no
    text contains: the last of them are given the names of ours. Otherwise ours come behind its
    last entry, if the model's embedding has rows there.

    Args:
        tokenizer: of any kind.
        vocab_size: rows of the embedding; default as many as the tokenizer has entries.
    """
    wanted = missing_chat_tokens(tokenizer)
    if not wanted:
        return tokenizer
    free = _reserved(tokenizer)
    if len(free) >= len(wanted):
        # Not the first: those are the ones that other programs know, such as padding and unknown.
        return _renamed(tokenizer, dict(zip(free[-len(wanted) :], wanted, strict=True)))
    if vocab_size is not None and tokenizer.vocab_size + len(wanted) <= vocab_size:
        return _appended(tokenizer, wanted)
    return None


def reserve_chat_tokens(tokenizer: Tokenizer, vocab_size: int | None) -> Tokenizer:
    """The function does what `--reserve-chat-tokens` asks for; see `add_chat_tokens`.

    Raises:
        UserError: there are no unused ids.
    """
    reserved = add_chat_tokens(tokenizer, vocab_size)
    if reserved is None:
        raise UserError(
            f"--reserve-chat-tokens: --tokenizer {tokenizer.name} has no unused ids; give the "
            f"model more with --vocab-size {vocab_size_with_chat_tokens(tokenizer)} or above"
        )
    return reserved


def vocab_size_with_chat_tokens(tokenizer: Tokenizer) -> int:
    """The size is that of a vocabulary with the missing tokens behind the last entry."""
    return tokenizer.vocab_size + len(missing_chat_tokens(tokenizer))


def _reserved(tokenizer: Tokenizer) -> list[str]:
    """The list names the special tokens that neither text nor the tokenizer itself uses."""
    definition = tokenizer.definition
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    used = json.dumps([definition.get(part) for part in parts])
    model = definition["model"]
    kept = {*SPECIAL_TOKENS, model.get("unk_token"), tokenizer.text_of(tokenizer.eot_id)}
    if model.get("unk_id") is not None:
        kept.add(model["vocab"][model["unk_id"]][0])
    names = [token["content"] for token in definition.get("added_tokens") or []]
    return [
        name for name in names if name in tokenizer.reserved - kept and json.dumps(name) not in used
    ]


def _renamed(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """The function gives entries other names, in the vocabulary too where it lists them."""
    definition = tokenizer.definition
    vocab = definition["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab = {names.get(token, token): token_id for token, token_id in vocab.items()}
    else:  # of a Unigram model: pairs of an entry and its score
        vocab = [[names.get(token, token), score] for token, score in vocab]
    added = [
        token | {"content": names.get(token["content"], token["content"])}
        for token in definition["added_tokens"]
    ]
    return _with(tokenizer, added_tokens=added, model=definition["model"] | {"vocab": vocab})


def _appended(tokenizer: Tokenizer, names: list[str]) -> Tokenizer | None:
    """The function adds entries at the end, or returns None where that is not where they come."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    backend.add_special_tokens(names)
    if min(map(backend.token_to_id, names)) < tokenizer.vocab_size:
        return None
    return _with(tokenizer, added_tokens=json.loads(backend.to_str())["added_tokens"])


def _with(tokenizer: Tokenizer, **parts) -> Tokenizer:
    """The function makes a tokenizer of another's definition with some parts replaced."""
    return Tokenizer(json.dumps(tokenizer.definition | parts), tokenizer.name)
