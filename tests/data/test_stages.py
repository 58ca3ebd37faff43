import contextlib
import itertools
import json
import re
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner.data import stages
from hamner.data.shuffle import shuffled_documents
from hamner.data.specs import Spec
from hamner.data.stages import SourceLost, epochs, mixture, one_epoch, packed
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
    return packed(mixed(sources, weights, state, seed), num_rows, seq_len)


def mixed(sources, weights, state, seed=0):
    specs = [Spec("files", "", weight, f"source {i}") for i, weight in enumerate(weights)]
    readers = [
        partial(epochs, source, spec.text, seed)
        for source, spec in zip(sources, specs, strict=True)
    ]
    return mixture(specs, readers, state)


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
        if sum(map(len, inputs)) >= 2 * total:
            break
        rows = stream([source], [1.0], num_rows, seq_len, state, seed)
        for row, after in itertools.islice(rows, count):
            inputs.append(row.inputs.numpy().ravel())
            targets.append(row.targets.numpy().ravel())
            state = json.loads(json.dumps(after))
    inputs, targets = np.concatenate(inputs), np.concatenate(targets)
    assert sorted(inputs[:total]) == source.every_token.tolist()
    assert sorted(inputs[total : 2 * total]) == source.every_token.tolist()
    assert targets[:-1].tolist() == inputs[1:].tolist()
    uninterrupted = next(stream([source], [1.0], 1, len(inputs), seed=seed))[0]
    assert inputs.tolist() == uninterrupted.inputs.flatten().tolist()
    assert targets.tolist() == uninterrupted.targets.flatten().tolist()


@given(lengths=LENGTHS, shape=st.tuples(st.integers(1, 4), st.integers(1, 17)))
def test_document_ids_begin_at_zero_and_change_where_the_document_does(lengths, shape):
    source = FakeSource(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for rows, _ in itertools.islice(stream([source], [1.0], *shape), 20):
        assert rows.inputs.dtype == rows.targets.dtype == torch.int64
        assert rows.document_ids.dtype == torch.int32
        assert rows.inputs.shape == rows.targets.shape == rows.document_ids.shape == shape
        assert (rows.document_ids[:, 0] == 0).all()
        inputs = rows.inputs.numpy()
        steps = np.diff(rows.document_ids.numpy(), axis=1)
        same = (np.diff(owner[inputs], axis=1) == 0) & (np.diff(inputs, axis=1) == 1)
        assert steps.tolist() == (~same).astype(int).tolist()


@given(
    lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS),
    weights=st.tuples(*[st.floats(0.05, 20)] * 3),
    stop=st.integers(1, 60),
)
def test_mixture_keeps_to_the_weights_and_resumes(lengths, weights, stop):
    sources = [FakeSource(some, first_token=1000 * i) for i, some in enumerate(lengths)]

    counts = np.zeros(3)
    items = list(itertools.islice(mixed(sources, weights, None), 120))
    for ids, _, state in items:
        assert [s["tokens"] if s else 0 for s in state["sources"]] == counts.tolist()
        counts[ids[0] // 1000] += len(ids)
        # Nobody is ahead of another by more than the document that it was just given.
        ahead = counts / weights
        assert (ahead - 40 / np.array(weights) <= ahead.min() + 1e-9).all()
    after = {"documents": items[stop][2], "used": 0}
    rest = list(itertools.islice(mixed(sources, weights, after), 120 - stop))
    for (ids, _, state), (again, _, state_again) in zip(items[stop:], rest, strict=True):
        assert ids.tolist() == again.tolist()
        assert state == state_again


class FailingSource(FakeSource):
    """Fails instead of giving its n-th document, counted over all attempts, for each n given."""

    def __init__(self, lengths, first_token, failures):
        super().__init__(lengths, first_token)
        self._given = itertools.count()
        self._failures = failures

    def tokens(self, split, seed, epoch, state):
        for item in super().tokens(split, seed, epoch, state):
            if next(self._given) in self._failures:
                raise UserError("failed")
            yield item


@settings(max_examples=50)
@given(
    lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS),
    failures=st.tuples(*[st.sets(st.integers(0, 60), max_size=12)] * 3),
    weights=st.tuples(*[st.floats(0.1, 10)] * 3),
    shapes=SHAPES,
    lost_tokens=st.integers(0, 200),
)
def test_no_token_is_lost_or_repeated_by_lost_sources(
    lengths, failures, weights, shapes, lost_tokens
):
    """Sources fail and come back, the run is interrupted, its shape changes: all at any time."""
    sources = [FailingSource(some, 2000 * i, failures[i]) for i, some in enumerate(lengths)]
    inputs, state = [], None
    for num_rows, seq_len, count in itertools.cycle([*shapes, (1, 3, 2)]):
        if sum(map(len, inputs)) > 800:
            break
        rows = stream(sources, weights, num_rows, seq_len, state)
        with (
            mock.patch.object(stages, "LOST_TOKENS", lost_tokens),
            contextlib.suppress(UserError),  # the last one is lost: a run stops, and is resumed
        ):
            for row, after in itertools.islice(rows, count):
                inputs.append(row.inputs.numpy().ravel())
                state = json.loads(json.dumps(after))
    tokens = np.concatenate(inputs)
    for i, some in enumerate(lengths):
        of_source = tokens[tokens // 2000 == i]
        expected = []
        for ids, _ in epochs(FakeSource(some, 2000 * i), "x", 0, None):
            if len(expected) >= len(of_source):
                break
            expected += ids.tolist()
        assert of_source.tolist() == expected[: len(of_source)]


def test_a_source_that_fails_before_its_first_document_is_refused():
    sources = [FakeSource([3]), FailingSource([3, 3], 1000, {0})]
    with pytest.raises(UserError, match="failed") as caught:
        list(itertools.islice(mixed(sources, [1, 1], None), 10))
    assert not isinstance(caught.value, SourceLost)


@pytest.mark.parametrize("weight", [1, 3])
def test_a_lost_source_is_asked_again_and_takes_its_share_from_there(caplog, monkeypatch, weight):
    monkeypatch.setattr(stages, "LOST_TOKENS", 100)
    always = range(3, 12)
    sources = [FakeSource([10] * 20), FailingSource([10] * 20, 1000, set(always))]
    items = list(itertools.islice(mixed(sources, [1, weight], None), 400))
    is_second = [ids[0] >= 1000 for ids, _, _ in items]
    lost = [state["lost"][1] is not None for _, _, state in items]
    begin, end = lost.index(True), 400 - lost[::-1].index(True)
    assert not any(is_second[begin : end - 1]) and is_second[end - 1]
    # Nine attempts, each after 100 tokens of the other, then its share of the documents as before.
    assert end - 1 - begin == 9 * 10
    assert abs(sum(is_second[end:]) - (400 - end) * weight / (1 + weight)) <= 1
    assert caplog.text.count("TRAINING GOES ON WITHOUT IT") == len(always)
    assert caplog.text.count("source 1: is back") == 1


def test_repeated_documents_are_announced(caplog):
    list(itertools.islice(epochs(FakeSource([1, 1]), "notes.txt", 0, None), 19))
    found = [int(n) for n in re.findall(r"notes\.txt: all .* read (\d+) times", caplog.text)]
    assert found == [1, 2, 4, 8]


def test_state_of_a_longer_document_is_refused():
    with pytest.raises(UserError, match="--resume: .* damaged"):
        documents = {"sources": [None], "credit": [0.0], "lost": [None], "used": [0]}
        next(mixed([FakeSource([3])], [1], {"documents": documents, "used": 3}))


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
    specs = [Spec("files", "", 1.0, "x")] * 2
    readers = [lambda _, source=source: one_epoch(source, "validation", 0) for source in sources]
    tokens = np.concatenate([ids for ids, _, _ in mixture(specs, readers, None)])
    assert sorted(tokens) == sorted(np.concatenate([s.every_token for s in sources]))
