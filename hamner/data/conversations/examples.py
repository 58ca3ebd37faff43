"""Conversations become what fine-tuning trains on: tokens, mask, split; odd cases are counted."""

from dataclasses import dataclass, field

import numpy as np

from hamner.config.train import TrainConfig
from hamner.data.chat_template import render_end, render_message
from hamner.data.conversations.reading import Conversation, read_conversations
from hamner.data.documents import split_of
from hamner.data.loader import DataConfig
from hamner.data.specs import parse_specs
from hamner.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """An example is a conversation in tokens.

    Attributes:
        ids: (n,) int32.
        learned: (n,) bool, whether the loss counts the prediction of each token.
    """

    ids: np.ndarray
    learned: np.ndarray

    @property
    def length(self) -> int:
        """The length is that in a row (positions): the last token is only a target."""
        return len(self.ids) - 1


@dataclass
class ConversationSource:
    """A source has the examples of one `--data` spec, and what became of its conversations.

    Attributes:
        name: the spec, as the user wrote it.
        weight: how often an epoch goes through the training examples.
        train: examples to train on.
        validation: examples held out.
        duplicates: conversations equal to an earlier one, of whatever source; they are kept.
        cut: origins of those longer than a row, which lost their last turns.
        tokens_cut: tokens those turns had.
        too_long: origins of those of which not even the first answer fits a row; dropped.
        nothing_learned: origins of those without an answer; dropped.
    """

    name: str
    weight: float
    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    duplicates: int = 0
    cut: list[str] = field(default_factory=list)
    tokens_cut: int = 0
    too_long: list[str] = field(default_factory=list)
    nothing_learned: list[str] = field(default_factory=list)


def load_examples(
    config: DataConfig | TrainConfig, tokenizer: Tokenizer
) -> list[ConversationSource]:
    """The function reads, tokenizes, cuts and splits the conversations of all `--data` specs.

    A weight counts passes an epoch here. No example is longer than a row. Conversations are held
    out by their hash: equal ones are never on both sides.

    Raises:
        UserError: a spec, file or row that cannot be read; no special tokens.
    """
    seen: set[str] = set()
    sources = []
    for spec in parse_specs(config.data):
        source = ConversationSource(spec.text, spec.weight)
        for conversation in read_conversations(spec):
            text = _canonical(conversation)
            source.duplicates += text in seen
            seen.add(text)
            example = _tokenize(conversation, tokenizer, config.seq_len, source)
            if example is not None:
                split = split_of(text, config.val_fraction)
                (source.validation if split == "validation" else source.train).append(example)
        sources.append(source)
    return sources


def _canonical(conversation: Conversation) -> str:
    return "\0".join(f"{m.role}\0{m.content.strip()}" for m in conversation.messages)


def _tokenize(
    conversation: Conversation, tokenizer: Tokenizer, seq_len: int, source: ConversationSource
) -> Example | None:
    """The example is the longest beginning that fits `seq_len` and ends with an answer, or None.

    What follows the last answer teaches nothing and is left out.
    """
    ids: list[int] = []
    learned: list[bool] = []
    answers_end: list[int] = []
    for message in conversation.messages:
        part = render_message(message, tokenizer)
        ids += part.ids
        learned += part.learned
        if any(part.learned):
            answers_end.append(len(ids))
    if not answers_end:
        source.nothing_learned.append(conversation.origin)
        return None
    closing = render_end(tokenizer)
    fitting = [end for end in answers_end if end + len(closing.ids) - 1 <= seq_len]
    if not fitting:
        source.too_long.append(conversation.origin)
        return None
    if len(fitting) < len(answers_end):
        source.cut.append(conversation.origin)
        source.tokens_cut += answers_end[-1] - fitting[-1]
    end = fitting[-1]
    return Example(
        np.array(ids[:end] + closing.ids, np.int32),
        np.array(learned[:end] + closing.learned, bool),
    )
