import json

from hypothesis import given
from hypothesis import strategies as st

from hamner.data.shuffle import permutation, shuffled_documents


class ListFile:
    """A file of blocks in memory."""

    def __init__(self, blocks):
        self._blocks = blocks

    def blocks(self, start, *key):
        for number in permutation(len(self._blocks), *key)[start:]:
            yield self._blocks[number]


def test_permutation_is_pinned():
    """A later version must go through the data in the same order, or resumed runs repeat some."""
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(8, 0, 1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]


@given(st.integers(0, 300), st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_permutation_has_every_index_once(length, key):
    assert sorted(permutation(length, *key).tolist()) == list(range(length))


@given(
    sizes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=5),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_document_once_and_resumable_after_each(sizes, seed, epoch):
    files = [
        ListFile([[(f, b, r) for r in range(size)] for b, size in enumerate(blocks)])
        for f, blocks in enumerate(sizes)
    ]
    expected = [(f, b, r) for f, s in enumerate(sizes) for b, n in enumerate(s) for r in range(n)]
    whole = list(shuffled_documents(files, seed, epoch, None))
    assert sorted(document for document, _ in whole) == expected
    for index, (_, state) in enumerate(whole):
        rest = shuffled_documents(files, seed, epoch, json.loads(json.dumps(state)))
        assert list(rest) == whole[index + 1 :]


def test_order_depends_on_seed_and_epoch_at_every_level():
    files = [ListFile([[(f, b, r) for r in range(9)] for b in range(9)]) for f in range(9)]

    def order(seed, epoch):
        documents = [d for d, _ in shuffled_documents(files, seed, epoch, None)]
        by_file = list(dict.fromkeys(f for f, _, _ in documents))
        by_block = list(dict.fromkeys((f, b) for f, b, _ in documents))
        return by_file, by_block, documents

    assert order(0, 0) == order(0, 0)
    for other in (order(1, 0), order(0, 1)):
        assert all(a != b for a, b in zip(order(0, 0), other, strict=True))
