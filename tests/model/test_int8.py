"""A model with int8 matmuls has, nearly, the loss and the gradients of one without."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from hamner.model.int8 import LINEARS, Int8Linears, Operand, norms_after
from hamner.model.transformer import Transformer
from hamner.plan.memory import FULL, NONE, SELECTIVE
from hamner.plan.step_time import gradients_by_norms
from tests.kernels.passes import record_passes
from tests.models import DENSE, MOE, cpu_ops

DENSE_LAYER, MOE_LAYER = (
    replace(config, num_layers=1, num_shared_experts=shared)
    for config, shared in ((DENSE, 0), (MOE, 1))
)


def loss_and_gradients(
    config, matmul: str, policy=NONE, attention: str = "triton"
) -> tuple[float, dict[str, torch.Tensor]]:
    model = Transformer(config, cpu_ops("triton", attention), (policy,) * config.num_layers)
    model.initialize(0)
    if matmul != "bf16":
        model.int8 = Int8Linears(config, matmul, "cpu")
    tokens = torch.randint(config.vocab_size, (1, 25), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if matmul != "bf16":
        gradients["errors"] = model.int8.errors.grad
    return loss.item(), gradients


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@contextlib.contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """The context gives the sizes of all storages that forward passes in it keep, in bytes."""
    sizes = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    found = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found
    found += sorted(sizes.values())


def test_gradients_point_where_they_did_and_nothing_more_is_kept_for_them():
    with kept_for_backward() as kept:
        loss, exact = loss_and_gradients(DENSE_LAYER, "bf16")
    with kept_for_backward() as int8_kept:
        int8_loss, gradients = loss_and_gradients(DENSE_LAYER, "int8-all")
    assert int8_kept == kept
    assert int8_loss == pytest.approx(loss, abs=1e-3)
    for name, gradient in exact.items():
        # Quantisation is there, and small: a cosine of 0.999 is an error of 4.5% of the norm.
        assert cosine(gradients[name], gradient) > 0.999, name
        assert not torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("attention", ["triton", "sdpa"])
def test_with_qk_norm_around_any_attention(attention):
    config = replace(DENSE_LAYER, qk_norm=True)
    _, kept = loss_and_gradients(config, "int8", attention=attention)
    for policy in (SELECTIVE, FULL):
        _, recomputed = loss_and_gradients(config, "int8", policy, attention)
        for name, gradient in kept.items():
            assert torch.equal(recomputed[name], gradient), (policy, name)
    qkv = kept["errors"][0].sum(dim=1)
    assert (qkv[:4, 0] > 0).all() and (qkv[4:] == 0).all()


@pytest.mark.parametrize(
    ("policy", "attention"), [(NONE, "triton"), (FULL, "triton"), (SELECTIVE, "sdpa")]
)
def test_a_norm_quantises_the_gradient_of_the_layer_before_it(policy, attention, monkeypatch):
    """Only the last layer's down, and around another attention every down, has a pass of its own
    for it; the bits are those of such passes."""
    config = replace(DENSE_LAYER, num_layers=2)
    quantised = record_passes(monkeypatch)
    _, gradients = loss_and_gradients(config, "int8", policy, attention)
    handed = quantised.count((24, config.hidden_size))
    quantised.clear()
    monkeypatch.setattr("hamner.model.int8.norms_after", lambda config: {})
    _, apart = loss_and_gradients(config, "int8", policy, attention)
    assert quantised.count((24, config.hidden_size)) - handed == (3 if attention == "triton" else 2)
    for name, gradient in apart.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize(
    ("fallen", "handed"),
    [
        ([], [(0, "o"), (1, "o"), (0, "down")]),
        ([Operand(0, "o", "gradient")], [(1, "o"), (0, "down")]),
        ([Operand(0, "o", "input")], [(0, "o"), (1, "o"), (0, "down")]),
        ([Operand(1, "qkv", name) for name in ("input", "gradient")], [(0, "o"), (1, "o")]),
    ],
)
def test_what_fell_back_is_not_handed_over(fallen, handed):
    linears = Int8Linears(replace(DENSE_LAYER, num_layers=2), "int8", "cpu")
    linears.fall_back(fallen)
    found = linears.settings()
    takers = [
        (layer, name)
        for name in ("o", "down")
        for layer, settings in enumerate(found)
        if "takes_from" in settings.get(name, {})
    ]
    assert takers == handed
    givers = [settings.get("hands_to") for by_name in found for settings in by_name.values()]
    assert sum(giver is not None for giver in givers) == len(handed)


@pytest.mark.parametrize("change", [{}, {"use_differential_attention": True}])
def test_norms_after_linear_layers_are_of_ops_that_begin_with_them(change):
    assert norms_after(MOE) == {} and gradients_by_norms(MOE) == ()
    config = replace(DENSE, **change)
    found, layers = norms_after(config), DENSE.num_layers
    assert len(found) == (layers if change else 2 * layers - 1)
    # As the plan counts them.
    assert {name for _, name in found} == {LINEARS[i] for i in gradients_by_norms(config)}


def test_experts_and_router_are_not_int8(monkeypatch):
    """Of a mixture's layer two matmuls are int8, qkv, whose input the norm quantises, and o."""
    quantised = record_passes(monkeypatch)
    loss_and_gradients(MOE_LAYER, "int8")
    d, qkv = MOE.hidden_size, MOE.qkv_size
    forward = [(qkv, d), (24, d), (d, d)]
    assert quantised == [*forward, (24, d), (d, d), (24, qkv), (qkv, d)]
