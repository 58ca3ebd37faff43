"""The whole model and the optimizer agree on the kernels and on plain torch."""

from dataclasses import replace

import pytest
import torch

from hamner import kernels as fused
from hamner.config.options import OPTIONS
from hamner.kernels.norm_attention import add_rms_norm_attention
from hamner.model.transformer import Transformer
from hamner.plan.memory import FULL, NONE, SELECTIVE
from hamner.train.optimizer import Optimizer
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.models import DENSE, MOE, cpu_ops

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 61}
CONFIGS = {
    "dense": replace(DENSE, **SMALL, num_kv_heads=1, expert_intermediate_size=40),
    "untied": replace(DENSE, **SMALL, num_kv_heads=2, tie_word_embeddings=False),
    "moe": replace(MOE, **SMALL, num_kv_heads=1, expert_intermediate_size=24, num_shared_experts=1),
    "qk-norm": replace(DENSE, **SMALL, num_kv_heads=1, qk_norm=True),
    "differential": replace(DENSE, **SMALL, num_kv_heads=2, use_differential_attention=True),
}


def run(config, kernels, attention, policies, documents, dtype=torch.float32):
    """`run` gives loss, cross-entropy and every parameter's gradient, by name."""
    model = Transformer(config, cpu_ops(kernels, attention), policies)
    model.initialize(0)
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(61, (2, 2, 19), generator=generator)
    targets[0, :4] = -100
    ids = (torch.arange(19, dtype=torch.int32) // 7).expand(2, 19) if documents else None
    output = model(inputs, targets, ids)
    output.loss.backward()
    results = {"loss": output.loss.detach(), "cross-entropy": output.cross_entropy.detach()}
    return results | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own test is test_trainer_gpu.py")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("policies", "documents"),
    [((NONE, NONE), False), ((SELECTIVE, SELECTIVE), True), ((FULL, SELECTIVE), False)],
)
def test_kernels_and_plain_torch_agree(name, policies, documents):
    config = CONFIGS[name]
    fused = run(config, "triton", "triton", policies, documents)
    plain = run(config, "torch", "sdpa", policies, documents)
    exact = run(config, "torch", "sdpa", (NONE, NONE), documents, torch.float64)
    for result in exact:
        # Many roundings add up over two layers: the floor is 32 eps rather than one op's 4.
        assert_as_accurate_as_torch(
            result, fused[result], plain[result], exact[result], floor_eps=32.0
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own test is test_trainer_gpu.py")
@pytest.mark.parametrize(("kernels", "attention"), [("triton", "sdpa"), ("torch", "triton")])
@pytest.mark.parametrize("name", ["dense", "qk-norm"])
def test_rope_and_attention_of_different_sources(name, kernels, attention):
    """Then RoPE's backward is an op of its own."""
    config, policies = CONFIGS[name], (NONE, SELECTIVE)
    assert cpu_ops("triton", "triton").norm_attention is add_rms_norm_attention
    assert cpu_ops(kernels, attention).norm_attention is not add_rms_norm_attention
    mixed = run(config, kernels, attention, policies, True)
    plain = run(config, "torch", "sdpa", policies, True)
    exact = run(config, "torch", "sdpa", policies, True, torch.float64)
    for result in exact:
        assert_as_accurate_as_torch(
            result, mixed[result], plain[result], exact[result], floor_eps=32.0
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own test is test_trainer_gpu.py")
def test_another_attention_reads_what_is_normed_again(monkeypatch):
    """The first of two layers norms again in backward, the second in its second forward pass."""
    config, normed = CONFIGS["qk-norm"], []
    norm_and_rotate = fused.qk_norm_rope

    def watched(*args, **settings):
        normed.append(None)
        return norm_and_rotate(*args, **settings)

    kept = run(config, "triton", "sdpa", (NONE, NONE), True)
    monkeypatch.setattr(fused, "qk_norm_rope", watched)
    recomputed = run(config, "triton", "sdpa", (SELECTIVE, FULL), True)
    assert len(normed) == 4
    for name, result in recomputed.items():
        assert torch.equal(result, kept[name]), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own test is test_trainer_gpu.py")
def test_optimizers_agree():
    weights = {}
    for kernels in ("triton", "torch"):
        ops = cpu_ops(kernels, "sdpa")
        model = Transformer(CONFIGS["dense"], cpu_ops("torch", "sdpa"))
        model.initialize(0)
        optimizer = Optimizer(model, ops, OPTIONS["tiny"], dtype=torch.float32)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 2:
                model.embed.weight.grad[0, 0] = torch.inf
            optimizer.step(1e-2)
        weights[kernels] = {n: p.detach() for n, p in model.named_parameters()}
    for name, tensor in weights["torch"].items():
        torch.testing.assert_close(weights["triton"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
