import gc
import weakref
from dataclasses import replace

import pytest
import torch

from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.ops import build_ops
from hamner.model.recompute import recomputed_in_backward
from hamner.model.transformer import Transformer
from hamner.plan.memory import FULL, NONE, SELECTIVE

MIXTURES = {
    "routed": {},
    "shared": {"num_shared_experts": 1},
    "bias": {"router_balance": "bias"},
}


def mixture(**changes) -> ModelConfig:
    tiny = OPTIONS["tiny"].model
    return replace(
        tiny,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        expert_intermediate_size=32,
        vocab_size=128,
        num_experts=4,
        num_experts_per_token=2,
        **changes,
    )


def gradients(config: ModelConfig, policy, device) -> dict[str, torch.Tensor]:
    shape = AttentionShape.of_model(
        config, device=device, dtype=torch.float32, seq_len=16, micro_batch_size=2
    )
    attention = get_attention("triton", shape)
    model = Transformer(config, build_ops("triton", attention), (policy,) * config.num_layers)
    model.to(device).initialize(0)
    tokens = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    output = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    output.loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_has_the_gradients_of_keeping_everything(kind, device):
    config = mixture(**MIXTURES[kind])
    kept, *others = (gradients(config, policy, device) for policy in (NONE, SELECTIVE, FULL))
    for recomputed in others:
        for name in kept:
            assert torch.equal(recomputed[name], kept[name]), name


def square_twice(x: torch.Tensor, calls: list) -> tuple[torch.Tensor, weakref.ref]:
    """Two operations that save the doubled x square it; the second result is what became of it."""
    doubled = 2 * x
    source = x.detach()

    def recompute() -> torch.Tensor:
        calls.append(None)
        return 2 * source

    with recomputed_in_backward(doubled, recompute):
        out = doubled.square().sum() + doubled.view(-1).square().sum()
    return out, weakref.ref(doubled)


def test_what_is_saved_is_freed_and_recomputed_once_for_all_readers():
    calls = []
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    out, doubled = square_twice(x, calls)
    gc.collect()
    assert doubled() is None
    assert not calls
    out.backward(retain_graph=True)
    assert len(calls) == 1
    assert torch.equal(x.grad, 16 * x)
    out.backward()
    assert len(calls) == 2
    assert torch.equal(x.grad, 32 * x)


def test_views_of_parts_are_made_from_one_recomputed_value():
    """As attention saves q, k and v of a packed tensor, transposed or not."""
    calls = []
    x = torch.arange(1.0, 13.0).view(2, 6).requires_grad_()
    packed = 2 * x
    source = x.detach()

    def recompute() -> torch.Tensor:
        calls.append(None)
        return 2 * source

    with recomputed_in_backward(packed, recompute):
        first, second = packed.split((2, 4), dim=1)
        out = first.square().sum() + second.mT.pow(3).sum()
    packed.detach().zero_()  # were it kept, this would show
    out.backward()
    assert len(calls) == 1
    expected = torch.cat((8 * source[:, :2], 24 * source[:, 2:] ** 2), dim=1)
    torch.testing.assert_close(x.grad, expected)


def test_other_tensors_are_kept_as_ever():
    x, other = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    with recomputed_in_backward(x, lambda: x.detach()):
        (other * other).sum().backward()
    assert torch.equal(other.grad, torch.full((3,), 4.0))


def test_under_other_hooks_it_keeps_the_tensor():
    """A block that is checkpointed as a whole must see everything that is saved."""
    seen, calls = [], []
    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        out, _ = square_twice(x, calls)
    out.backward()
    assert len(seen) >= 2
    assert not calls
