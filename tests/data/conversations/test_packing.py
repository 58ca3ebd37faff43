"""Packed rows: every token once, in its own document, and the mask position by position."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner.data.conversations.examples import Example
from hamner.data.conversations.packing import lay_out, pack
from tests.models import DENSE, build


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_every_item_once_and_no_row_too_full(lengths):
    examples = [example([number] * (length + 1), "") for number, length in enumerate(lengths)]
    rows = pack(examples, 50)
    assert sorted(int(e.ids[0]) for row in rows for e in row) == list(range(len(lengths)))
    fills = sorted(sum(e.length for e in row) for row in rows)
    assert all(0 < fill <= 50 for fill in fills)
    # Best fit opens a row only when no other has room: two rows never fit into one.
    assert all(a + b > 50 for a, b in zip(fills, fills[1:], strict=False))


def example(ids: list[int], learned: str) -> Example:
    return Example(np.array(ids, np.int32), np.array([flag == "x" for flag in learned]))


def test_an_item_goes_where_it_leaves_the_smallest_room():
    rows = pack([example([0] * (length + 1), "") for length in (30, 40, 10, 20)], 50)
    assert [[e.length for e in row] for row in rows] == [[30, 20], [40, 10]]


A = example([2, 10, 3, 11, 12, 4], "...xxx")
B = example([2, 20, 3, 21, 4], "...xx")


def test_positions_one_by_one():
    batch = lay_out([[A, B], [B]], seq_len=12, padding=0)
    assert batch.inputs.tolist() == [
        [2, 10, 3, 11, 12, 2, 20, 3, 21, 0, 0, 0],
        [2, 20, 3, 21, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.targets.tolist() == [
        [-100, -100, 11, 12, 4, -100, -100, 21, 4, -100, -100, -100],
        [-100, -100, 21, 4, *[-100] * 8],
    ]
    assert batch.document_ids.tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2],
        [0, 0, 0, 0, *[1] * 8],
    ]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32


def test_a_row_that_is_exactly_full_has_no_padding():
    batch = lay_out([[A, B]], seq_len=9, padding=0)
    assert batch.document_ids.tolist() == [[0] * 5 + [1] * 4]


def test_a_packed_conversation_is_computed_as_if_alone():
    """Neither the neighbours in the row nor the position in it change a logit."""
    model = build(DENSE)
    packed = lay_out([[A, B]], seq_len=12, padding=0)
    alone = lay_out([[B]], seq_len=4, padding=0)
    with torch.no_grad():
        both = model(packed.inputs, document_ids=packed.document_ids).logits[0, 5:9]
        one = model(alone.inputs, document_ids=alone.document_ids).logits[0]
    torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-6)


def test_gradient_comes_from_learned_tokens_alone():
    """Changing a masked target or the padding changes nothing; changing a learned one does."""
    model = build(DENSE)

    def gradient(row: list[Example]) -> torch.Tensor:
        model.zero_grad()
        batch = lay_out([row], seq_len=12, padding=0)
        model(batch.inputs, batch.targets, batch.document_ids).loss.backward()
        return model.layers[0].attention.qkv_proj.weight.grad.clone()

    # The last token of a conversation is only a target: unlearned, it cannot matter.
    reference = gradient([example([2, 10, 3, 11, 4], "...x.")])
    assert torch.equal(reference, gradient([example([2, 10, 3, 11, 9], "...x.")]))
    assert not torch.equal(reference, gradient([example([2, 10, 3, 12, 4], "...x.")]))
