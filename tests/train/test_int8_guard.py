"""The guard reports int8 operands that lose too much, once, and gives them back to bf16."""

import pytest
import torch

from hamner.kernels.int8_linear import OPERANDS, products
from hamner.model.int8 import Int8Linears, Operand
from hamner.train.int8_guard import LAG, MAX_ERROR, Int8Guard
from hamner.train.log import MAX_PENDING
from tests.models import DENSE, MOE

INPUT, WEIGHT = Operand(1, "down", "input"), Operand(1, "down", "weight")


def sums(int8: Int8Linears, **errors: float) -> torch.Tensor:
    """Every operand has an error of 1%, those of down in layer 1 as given, of any scale."""
    relative = torch.full((len(int8.operands),), 0.01)
    for name, error in errors.items():
        relative[int8.operands.index(Operand(1, "down", name))] = error
    return torch.stack((4.0 * relative.square(), torch.full_like(relative, 4.0)), dim=1).flatten()


@pytest.fixture
def int8() -> Int8Linears:
    return Int8Linears(DENSE, "int8", "cpu")


def test_an_operand_above_the_limit_falls_back_once(int8):
    assert LAG == MAX_PENDING + 1
    guard = Int8Guard(int8)
    assert guard.judge(7, sums(int8, input=0.99 * MAX_ERROR)) is None
    sentence = guard.judge(8, sums(int8, input=0.06))
    assert "int8 changes input of down in layer 1 (6.0%) by more than 5% at step 8" in sentence
    assert f"bf16 from step {8 + LAG} on" in sentence
    # Also what the next step, still in int8, measures of the same matmul.
    assert guard.judge(9, sums(int8, input=0.07, weight=0.07)) is None
    assert guard.judge(10, sums(int8, input=torch.nan, weight=torch.nan)) is None
    assert guard.due(9) == []
    assert guard.due(10) == [INPUT]
    assert int8.fall_back(guard.due(10))
    assert products(int8.matmuls[1, "down"]) == ("data_gradient",)
    assert products(int8.matmuls[0, "down"]) == ("forward", "data_gradient")
    assert not int8.fall_back(guard.due(11))


def test_many_are_one_sentence(int8):
    guard = Int8Guard(int8)
    found = guard.judge(1, torch.tensor([1.0, 4.0]).repeat(len(int8.operands)))
    assert found.count(" of ") == 4 and "and 44 others by more" in found
    int8.fall_back(guard.due(3))
    assert set(int8.matmuls.values()) == {"bf16"}
    assert int8.settings() == [{}, {}]
    assert int8.take_errors().eq(0).all()


def test_metrics_have_every_operand_that_is_quantised(int8):
    guard = Int8Guard(int8)
    nothing = dict.fromkeys(list(OPERANDS)[4:], torch.nan)
    guard.judge(1, sums(int8, input=0.0123456, weight=torch.nan, **nothing))
    described = guard.describe()
    assert list(described) == ["qkv", "o", "gate_up", "down"]
    assert described["down"]["input"] == [0.01, 0.0123]
    assert described["down"]["weight"] == [0.01, None]
    assert Int8Guard(None).describe() is None
    assert list(Int8Guard(Int8Linears(MOE, "int8", "cpu")).describe()) == ["qkv", "o"]


def test_the_list_goes_on_in_the_next_start(int8):
    guard = Int8Guard(int8)
    assert guard.state_dict() == {}
    guard.judge(8, sums(int8, input=0.06))
    state = guard.state_dict()
    assert state == {"int8_fallback": [[1, "down", "input", 10]]}
    for start in (Int8Guard(int8), Int8Guard(None)):  # and through a start in bf16
        start.load_state_dict(state)
        assert start.due(9) == [] and start.due(10) == [INPUT]
        assert start.state_dict() == state


@pytest.mark.parametrize("rows", ["down", [[1, "up", "input", 3]], [[1, "down", "input"]], 3])
def test_a_damaged_list_is_refused(rows):
    with pytest.raises((TypeError, ValueError)):
        Int8Guard(None).load_state_dict({"int8_fallback": rows})
