"""A run starts from random weights, or with `--init-from` from those of another run."""

import contextlib
from dataclasses import fields

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import SavedModel, find_saved_model
from hamner.config.model import NOT_THE_MODEL, ModelConfig, flag
from hamner.config.train import TrainConfig
from hamner.data.chat_tokens import (
    add_chat_tokens,
    missing_chat_tokens,
    reserve_chat_tokens,
    vocab_size_with_chat_tokens,
)
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.errors import UserError


def find_initial(config: TrainConfig) -> SavedModel | None:
    """The function finds the model that `--init-from` names, unless the run has gone on from it.

    Raises:
        UserError: there is no such model, or it has another shape or tokenizer than the run.
    """
    goes_on = config.resume and checkpoint.find(RunFolder(config.folder).checkpoints)
    if config.init_from is None or goes_on:
        return None
    saved = find_saved_model(config.init_from, flag="--init-from")
    theirs = saved.config.model
    # Positions have no weights: their number is free.
    free = {*NOT_THE_MODEL, "max_seq_len"}
    differences = [
        f"--{flag(name)} {getattr(config.model, name)} is not its {getattr(theirs, name)}"
        for name in (field.name for field in fields(ModelConfig))
        if name not in free and getattr(config.model, name) != getattr(theirs, name)
    ]
    if config.tokenizer != saved.config.tokenizer:
        named = load_tokenizer(config.tokenizer)
        # One that cannot be cut to the model's vocabulary is another one.
        with contextlib.suppress(UserError):
            named = named.cut(config.model.vocab_size)
        if named.fingerprint != saved.tokenizer.fingerprint:
            differences.append(
                f"--tokenizer {config.tokenizer} (fingerprint {named.fingerprint[:12]}) is not its "
                f"{saved.config.tokenizer} (fingerprint {saved.tokenizer.fingerprint[:12]})"
            )
    if differences:
        raise UserError(
            f"--init-from {config.init_from}: {' and '.join(differences)}; leave out the flag that "
            "says so (or --option), since a run goes on with the model and tokenizer of its weights"
        )
    return saved


def with_chat_tokens(tokenizer: Tokenizer, config: TrainConfig) -> Tokenizer:
    """The function gives a tokenizer the tokens of conversations if `--reserve-chat-tokens` asks.

    Raises:
        UserError: there are no unused ids for them, or the model reads them as text.
    """
    if not config.reserve_chat_tokens:
        return tokenizer
    if tokenizer.text_tags:
        raise UserError(
            f"--reserve-chat-tokens: the model of {config.init_from} has learned the tags of "
            "conversations as ordinary text; leave the flag out, fine-tuning goes on with them"
        )
    return reserve_chat_tokens(tokenizer, config.model.vocab_size)


def warn_of_missing_chat_tokens(tokenizer: Tokenizer, config: TrainConfig) -> list[str]:
    """The sentences say, while it can be mended, what fine-tuning will miss in the tokenizer."""
    missing = missing_chat_tokens(tokenizer)
    if config.resume or config.sft is not None or tokenizer.text_tags or not missing:
        return []
    mend = "start with --reserve-chat-tokens to give them unused ids of it"
    if add_chat_tokens(tokenizer, config.model.vocab_size) is None:
        mend = (
            f"start with --vocab-size {vocab_size_with_chat_tokens(tokenizer)} or above, and "
            "--reserve-chat-tokens to give them ids of it"
        )
    return [
        f"WARNING: --tokenizer {config.tokenizer} has no tokens {' '.join(missing)}, without which "
        f"hamner.sft cannot fine-tune the model on conversations later: {mend}"
    ]
