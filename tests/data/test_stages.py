import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamner.data.shuffle import shuffled_documents
from hamner.data.stages import epochs, mixture, one_epoch, packed
from hamner.errors import UserError
from tests.data.test_shuffle import ListFile


class FakeSource:
    """Documents in which every token is another number; an empty one stands for a skipped one."""

    def __init__(self, lengths, first_token=0, block=3):
        ends = np.cumsum([0, *lengths]) + first_token
        documents = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]
        blocks = [documents[i : i + block] for i in range(0, len(documents), block)]
        self._files = [ListFile(blocks[0::2]), ListFile(blocks[1::2])]
        self.every_token = np.arange(first_token, ends[-1])

    def identity(self):
        return {}

    def tokens(self, split, seed, epoch, state):
        return shuffled_documents(self._files, seed, epoch, state)


def stream(sources, weights, num_rows, seq_len, state=None, seed=0):
    """The pipeline from sources to rows, going on after `state`."""
    documents = state["documents"] if state else None
    states = documents["sources"] if documents else [None] * len(sources)
    streams = [epochs(source, "x", seed, s) for source, s in zip(sources, states, strict=True)]
    return packed(mixture(streams, weights, documents), num_rows, seq_len, state)


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(any)
SHAPES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 17), st.integers(0, 4)), min_size=1, max_size=12
)


@given(lengths=LENGTHS, shapes=SHAPES, seed=st.integers(0, 5))
def test_every_token_is_an_input_once_an_epoch_whatever_the_interruptions(lengths, shapes, seed):
    """Batch size and sequence length change at each restore; the state goes through JSON."""
    source = FakeSource(lengths)
    total = len(source.every_token)
    inputs, targets, state = [], [], None
    for num_rows, seq_len, count in itertools.cycle([*shapes, (1, 3, 2)]):
        if sum(map(np.size, inputs)) >= 2 * total:
            break
        rows = stream([source], [1.0], num_rows, seq_len, state, seed)
        for row, after in itertools.islice(rows, count):
            inputs.append(row.inputs.ravel())
            targets.append(row.targets.ravel())
            state = json.loads(json.dumps(after))
    inputs, targets = np.concatenate(inputs), np.concatenate(targets)
    assert sorted(inputs[:total]) == source.every_token.tolist()
    assert sorted(inputs[total : 2 * total]) == source.every_token.tolist()
    assert targets[:-1].tolist() == inputs[1:].tolist()
    uninterrupted = next(stream([source], [1.0], 1, len(inputs), seed=seed))[0]
    assert inputs.tolist() == uninterrupted.inputs.ravel().tolist()
    assert targets.tolist() == uninterrupted.targets.ravel().tolist()


@given(lengths=LENGTHS, shape=st.tuples(st.integers(1, 4), st.integers(1, 17)))
def test_document_ids_begin_at_zero_and_change_where_the_document_does(lengths, shape):
    source = FakeSource(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for rows, _ in itertools.islice(stream([source], [1.0], *shape), 20):
        assert rows.inputs.dtype == rows.targets.dtype == np.int64
        assert rows.document_ids.dtype == np.int32
        assert rows.inputs.shape == rows.targets.shape == rows.document_ids.shape == shape
        assert (rows.document_ids[:, 0] == 0).all()
        steps = np.diff(rows.document_ids, axis=1)
        consecutive = np.diff(rows.inputs, axis=1) == 1
        same = (np.diff(owner[rows.inputs], axis=1) == 0) & consecutive
        assert steps.tolist() == (~same).astype(int).tolist()


@given(
    lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS),
    weights=st.tuples(*[st.floats(0.05, 20)] * 3),
    stop=st.integers(1, 60),
)
def test_mixture_keeps_to_the_weights_and_resumes(lengths, weights, stop):
    sources = [FakeSource(some, first_token=1000 * i) for i, some in enumerate(lengths)]

    def run(state):
        states = state["sources"] if state else [None] * 3
        streams = [epochs(s, "x", 0, t) for s, t in zip(sources, states, strict=True)]
        return mixture(streams, weights, state)

    counts = np.zeros(3)
    items = list(itertools.islice(run(None), 120))
    for ids, state in items:
        counts[ids[0] // 1000] += len(ids)
        # Nobody is ahead of another by more than the document that it was just given.
        ahead = counts / weights
        assert (ahead - 40 / np.array(weights) <= ahead.min() + 1e-9).all()
        assert [s["tokens"] if s else 0 for s in state["sources"]] == counts.tolist()
    rest = list(itertools.islice(run(items[stop - 1][1]), 120 - stop))
    for (ids, state), (again, state_again) in zip(items[stop:], rest, strict=True):
        assert ids.tolist() == again.tolist()
        assert state == state_again


def test_exhausted_source_starts_its_next_epoch_in_a_new_order():
    stream = epochs(FakeSource([2, 0, 3, 1, 4, 2, 2, 5]), "x", 0, None)
    items = list(itertools.islice(stream, 21))
    orders = [[ids[0] for ids, _ in items[i : i + 7]] for i in (0, 7, 14)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]
    last = items[-1][1]
    assert (last["epoch"], last["documents"], last["tokens"]) == (2, 21, 3 * 19)
    assert items[14][1]["skipped"] in (2, 3)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_source_without_a_document_is_refused(lengths):
    with pytest.raises(UserError, match=r"--data notes\.txt: no document to train on \(\d empty"):
        next(epochs(FakeSource(lengths), "notes.txt", 0, None))


def test_finite_streams_end_and_leave_the_others():
    sources = [FakeSource([3, 3]), FakeSource([5] * 9, first_token=1000)]
    streams = [one_epoch(source, "validation", 0) for source in sources]
    tokens = np.concatenate([ids for ids, _ in mixture(streams, [1, 1], None)])
    assert sorted(tokens) == sorted(np.concatenate([s.every_token for s in sources]))
