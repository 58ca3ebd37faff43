"""The loader of conversations: epochs, weights, exact resume."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hamner.data.conversations.examples import ConversationSource, Example
from hamner.data.conversations.loader import ConversationLoader, validation_batch
from hamner.data.loader import DataConfig
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError

TOKENIZER = load_tokenizer(vocab_size=261)


def make_source(name: str, first_id: int, count: int, weight: float = 1.0) -> ConversationSource:
    """Examples of 5 to 14 tokens; each opens with a token that only it has."""
    source = ConversationSource(name, weight)
    for number in range(count):
        size = 5 + number % 10
        ids = np.array([first_id + number] + [4] * (size - 1), np.int32)
        source.train.append(Example(ids, ids == 4))
    return source


def unlearned(source: ConversationSource) -> ConversationSource:
    """The same examples, of one of which less is learned."""
    learned = source.train[7].learned.copy()
    learned[-1] = False
    source.train[7] = replace(source.train[7], learned=learned)
    return source


def make_loader(sources, **changes) -> ConversationLoader:
    settings = {"seq_len": 32, "batch_size": 3, "seed": 0} | changes
    return ConversationLoader(sources, TOKENIZER, DataConfig((), **settings))


def openings(batches) -> Counter:
    """How often each example came."""
    found = Counter()
    for batch in batches:
        found.update(batch.inputs[batch.inputs > 4].tolist())
    return found


def test_an_epoch_has_every_conversation_once():
    loader = make_loader([make_source("a", 10, 20), make_source("b", 100, 20)], batch_size=1)
    first = list(itertools.islice(loader, loader.rows_in_epoch(0)))
    expected = Counter([*range(10, 30), *range(100, 120)])
    assert openings(first) == expected
    second = list(itertools.islice(loader, loader.rows_in_epoch(1)))
    assert openings(second) == expected
    assert [b.inputs.tolist() for b in first] != [b.inputs.tolist() for b in second]


def test_an_epoch_packs_other_conversations_together_and_rows_with_room_come_anywhere():
    """Of 40 conversations, those that the loader lays down last leave rows unfilled."""
    loader = make_loader([make_source("a", 10, 40)], batch_size=1)
    packed, last_room = [], []
    for epoch in range(4):
        rows = [b.inputs for b in itertools.islice(loader, loader.rows_in_epoch(epoch))]
        packed.append({tuple(sorted(row[row > 4].tolist())) for row in rows})
        room = [int((row == TOKENIZER.eot_id).sum()) for row in rows]
        last_room.append(room[-1] == max(room))
    assert len(packed[0] & packed[1]) < len(packed[0]) / 2
    assert not all(last_room)


@pytest.mark.parametrize(
    ("weight", "epochs", "expected"),
    [(3.0, 1, {3}), (0.25, 4, {1}), (1.5, 2, {3}), (0.5, 1, {0, 1})],
)
def test_a_weight_counts_passes_an_epoch(weight, epochs, expected):
    source = make_source("a", 10, 40, weight)
    loader = make_loader([source], batch_size=1)
    rows = sum(loader.rows_in_epoch(epoch) for epoch in range(epochs))
    counts = openings(itertools.islice(loader, rows))
    assert {counts[i] for i in range(10, 50)} == expected
    assert sum(counts.values()) == 40 * weight * epochs


def test_batches_go_on_over_the_end_of_an_epoch():
    loader = make_loader([make_source("a", 10, 4)], batch_size=5, seq_len=16)
    assert loader.rows_in_epoch(0) < 5
    batches = list(itertools.islice(loader, 4))
    assert all(len(batch.inputs) == 5 for batch in batches)
    assert openings(batches).keys() == set(range(10, 14))


@pytest.mark.parametrize("batch_size", [3, 4])
def test_resume_is_exact_and_the_batch_size_may_change(batch_size):
    sources = [make_source("a", 10, 23, 1.5)]
    whole = make_loader(sources)
    rows = [row for batch in itertools.islice(whole, 24) for row in batch.inputs.tolist()]
    for taken in (0, 1, 7):
        loader = make_loader(sources)
        list(itertools.islice(loader, taken))
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = make_loader(sources, batch_size=batch_size)
        resumed.load_state_dict(state)
        rest = [row for batch in itertools.islice(resumed, 12) for row in batch.inputs.tolist()]
        assert rest == rows[3 * taken : 3 * taken + len(rest)]


@pytest.mark.parametrize(
    ("sources", "changes", "named"),
    [
        ([make_source("a", 10, 21)], {}, "--data"),
        ([make_source("a", 11, 20)], {}, "--data"),
        ([make_source("a", 10, 20, 2.0)], {}, "--data"),
        ([unlearned(make_source("a", 10, 20))], {}, "what --data says is learned is not what"),
        ([make_source("a", 10, 20)], {"seed": 1}, "--seed"),
        ([make_source("a", 10, 20)], {"seq_len": 48}, "--seq-len"),
    ],
)
def test_other_data_is_refused_on_resume(sources, changes, named):
    state = make_loader([make_source("a", 10, 20)]).state_dict()
    with pytest.raises(UserError, match=named):
        make_loader(sources, **changes).load_state_dict(state)


def test_earlier_versions_did_not_save_what_is_learned():
    state = make_loader([make_source("a", 10, 20)]).state_dict()
    del state["learned"]
    make_loader([unlearned(make_source("a", 10, 20))]).load_state_dict(state)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="--data a b: no conversation to train on"):
        make_loader([ConversationSource("a", 1.0), ConversationSource("b", 1.0)])
    held_out = ConversationSource("a", 1.0, validation=make_source("a", 10, 20).train)
    with pytest.raises(UserError, match="--val-fraction holds out all 20; lower it"):
        make_loader([held_out])


def test_validation_is_bounded_and_fixed():
    source = ConversationSource("a", 1.0, validation=make_source("a", 10, 40).train)
    whole = validation_batch([source], TOKENIZER, 32, 10_000)
    assert openings([whole]) == Counter(range(10, 50))
    part = validation_batch([source], TOKENIZER, 32, 100)
    assert 0 < (part.targets != -100).sum() <= 100
    chosen = sorted(openings([part]))
    assert chosen != list(range(10, 10 + len(chosen)))  # a file may be sorted by kind
    assert part.inputs.tolist() == validation_batch([source], TOKENIZER, 32, 100).inputs.tolist()
    assert len(validation_batch([ConversationSource("a", 1.0)], TOKENIZER, 32, 100).inputs) == 0
