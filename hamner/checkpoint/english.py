"""A model is tried on built-in English, which tells a wrong tokenizer from a right one."""

import math

import torch

from hamner.checkpoint.saved_model import SavedModel
from hamner.config.model import ModelConfig
from hamner.data.builtin import builtin_documents
from hamner.data.shuffle import permutation
from hamner.progress import SILENT, Status

MAX_TOKENS = 4_096
"""so many take a model of 300M parameters a few seconds on a CPU"""
MAX_SEQ_LEN = 512
GUESSING_SHARE = 0.9
"""of the loss of guessing: what models have that were trained on 100,000 tokens. With the tokenizer
of another model, one that was trained for long is worse than guessing."""


@torch.no_grad()
def english_loss(saved: SavedModel, status: Status = SILENT) -> float:
    """The function has the model predict built-in English and gives its loss, nats a token.

    The status shows how far it is.

    Raises:
        UserError: this Python has no such text.
    """
    model, tokenizer = saved.build(torch.device("cpu")), saved.tokenizer
    seq_len = min(saved.config.model.max_seq_len, MAX_SEQ_LEN)
    documents = builtin_documents()
    ids: list[int] = []
    for number in permutation(len(documents), 0):
        ids += [tokenizer.eot_id, *tokenizer.encode(documents[number])]
        if len(ids) > MAX_TOKENS:
            break
    rows = max(1, MAX_TOKENS // (seq_len + 1))
    text = torch.tensor(ids[: rows * (seq_len + 1)]).view(rows, -1)
    losses = []
    with status.task("trying it on built-in English", rows * seq_len, "tokens") as task:
        for row in text.split(1):
            losses.append(model(row[:, :-1], row[:, 1:].contiguous()).cross_entropy.item())
            task.advance(seq_len)
    return sum(losses) / rows


def loss_of_guessing(model: ModelConfig) -> float:
    """The loss is that of a model to which all tokens are equally likely."""
    return math.log(model.vocab_size)
