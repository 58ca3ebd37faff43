"""Conversations become what fine-tuning trains on: tokens, mask, split; odd cases are counted."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from hamner.config.train import TrainConfig
from hamner.data.chat_template import render_end, render_message
from hamner.data.conversations.reading import Conversation, Unusable, read_conversations
from hamner.data.documents import split_of
from hamner.data.loader import DataConfig
from hamner.data.specs import parse_specs
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.progress import SILENT, Status

GIVE_UP_ROWS = 10_000
"""rows of which not one can be used say enough about a source, which may be endless"""
NAMED_KINDS, NAMED_RANGES = 8, 8
"""kinds of unusable rows that are named, and ranges of lines of each; the rest are counted"""
SYSTEM_SHARE = 0.25
"""share of the conversations that must have a system prompt for one to be the data's"""


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
        rows: how many were read, with those that are no conversation.
        unusable: rows that are no conversation, file and line by kind; left out.
        systems: how many of those kept have each system prompt, or none.
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
    rows: int = 0
    unusable: dict[str, list[Unusable]] = field(default_factory=lambda: defaultdict(list))
    systems: Counter[str] = field(default_factory=Counter)

    @property
    def num_unusable(self) -> int:
        return sum(map(len, self.unusable.values()))

    def describe_unusable(self) -> list[str]:
        """The texts count the unusable rows, one for each kind, with file and lines."""
        kinds = sorted(self.unusable.items(), key=lambda kind: -len(kind[1]))
        texts = [f"{len(rows):,} {kind}: {_places(rows)}" for kind, rows in kinds[:NAMED_KINDS]]
        if rest := [len(rows) for _, rows in kinds[NAMED_KINDS:]]:
            texts.append(f"{sum(rest):,} of {len(rest):,} kinds more")
        return texts


class UnusableRows(UserError):
    """The exception is that more rows are no conversation than may be left out.

    Attributes:
        sources: that have them.
    """

    def __init__(self, sources: Sequence[ConversationSource], sentence: str) -> None:
        super().__init__(sentence)
        self.sources = sources


def load_examples(
    config: DataConfig | TrainConfig, tokenizer: Tokenizer, status: Status = SILENT
) -> list[ConversationSource]:
    """The function reads, tokenizes, cuts and splits the conversations of all `--data` specs.

    A weight counts passes an epoch here, 1 where there is none. No example is longer than a row.
    Conversations are held out by their hash: equal ones are never on both sides. Rows that are no
    conversation are left out, up to the share `config.bad_rows` of a source. The status shows the
    rows.

    Raises:
        UnusableRows: too many rows of a source are no conversation.
        UserError: a spec or file that cannot be read; no special tokens.
    """
    seen: set[str] = set()
    sources = []
    for spec in parse_specs(config.data, bare_weight=1.0):
        source = ConversationSource(spec.text, spec.weight)
        with status.task(f"reading and tokenizing {spec.text}", unit="rows") as task:
            for row in read_conversations(spec):
                source.rows += 1
                task.advance()
                if isinstance(row, Conversation):
                    _add(row, source, seen, config=config, tokenizer=tokenizer)
                else:
                    source.unusable[row.kind].append(row)
                if source.rows == GIVE_UP_ROWS == source.num_unusable:
                    break
        sources.append(source)
    _refuse_unusable(sources, config.bad_rows)
    return sources


def _add(
    conversation: Conversation,
    source: ConversationSource,
    seen: set[str],
    *,
    config: DataConfig | TrainConfig,
    tokenizer: Tokenizer,
) -> None:
    text = _canonical(conversation)
    source.duplicates += text in seen
    seen.add(text)
    example = _tokenize(conversation, tokenizer, config.seq_len, source)
    if example is not None:
        split = split_of(text, config.val_fraction)
        (source.validation if split == "validation" else source.train).append(example)
        first = conversation.messages[0]
        source.systems[first.content.strip() if first.role == "system" else ""] += 1


def _refuse_unusable(sources: Sequence[ConversationSource], share: float) -> None:
    """All that is wrong is said at once, so that it can be mended at once."""
    refused = [source for source in sources if source.num_unusable > share * source.rows]
    if refused:
        reasons = " | ".join(
            f"--data {source.name}: {source.num_unusable:,} of {source.rows:,} rows cannot be used "
            f"({'; '.join(source.describe_unusable())})"
            for source in refused
        )
        raise UnusableRows(
            refused,
            f"{reasons}; mend them, or let hamner.sft leave out more with --bad-rows SHARE "
            f"(now {share:g})",
        )


def _places(rows: Sequence[Unusable]) -> str:
    """The text has the lines of every file, those that follow each other as a range."""
    ranges: list[str] = []
    for name, of_file in groupby(rows, key=lambda row: row.name):
        numbers = [row.number for row in of_file]
        # Numbers in a row keep their distance to their index.
        runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
        for position, (_, run) in enumerate(runs):
            first, *more = [number for _, number in run]
            text = f"{first}-{more[-1]}" if more else f"{first}"
            ranges.append(text if position else f"{name}:{text}")
    rest = len(ranges) - NAMED_RANGES
    return ", ".join(ranges[:NAMED_RANGES]) + (f" and {rest:,} more places" if rest > 0 else "")


def most_used_system(sources: Sequence[ConversationSource]) -> str:
    """The system prompt is the one most conversations have, each as often as it is trained on.

    It is empty where few have one: then the model has learned to answer without.
    """
    counts: Counter[str] = Counter()
    for source in sources:
        for system, count in source.systems.items():
            counts[system] += count * source.weight
    without = counts.pop("", 0)
    if counts.total() < SYSTEM_SHARE * (counts.total() + without) or not counts:
        return ""
    return counts.most_common(1)[0][0]


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
        is_learned = message.learned and any(part.learned)
        learned += part.learned if is_learned else [False] * len(part.ids)
        if is_learned:
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
