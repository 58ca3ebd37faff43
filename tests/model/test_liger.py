"""`--kernels liger`: Liger's kernels run in the model, and refusals without them."""

from dataclasses import replace

import pytest
import torch

from hamner.config.options import for_option
from hamner.errors import UserError
from hamner.kernels.rope import rope_packed_reference
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.ops import build_ops
from hamner.model.transformer import Transformer
from hamner.parallel.device import select
from hamner.plan.memory import SELECTIVE
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.models import DENSE

WHY = "the optional extra hamner[liger] is not installed"


def test_a_cpu_refuses():
    config = replace(for_option("tiny"), kernels="liger", device="cpu")
    with pytest.raises(UserError, match="--kernels liger needs a GPU"):
        select(config)


@pytest.mark.parametrize("documents", [False, True])
def test_packed_rope(documents, device):
    pytest.importorskip("liger_kernel", reason=WHY)
    from hamner.model import liger

    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 6, 8 * 16, generator=generator).to(device)
    angles = torch.rand(9, 8, generator=generator).to(device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]], device=device)
    arguments = (qkv, angles.cos(), angles.sin(), 4, 2, positions if documents else None)
    expected = rope_packed_reference(*arguments)
    torch.testing.assert_close(liger.rope_packed(*arguments), expected)


def test_loss_ignores_targets(device):
    pytest.importorskip("liger_kernel", reason=WHY)
    from hamner.model import liger

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 64, generator=generator).to(device).requires_grad_()
    weight = torch.randn(50, 64, generator=generator).to(device).requires_grad_()
    targets = torch.randint(50, (12,), generator=generator).to(device)
    targets[3] = -100
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    loss = liger.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_whole_model(qk_norm, recompute):
    """Liger's norms and SwiGLU do not run in Triton's interpreter."""
    pytest.importorskip("liger_kernel", reason=WHY)
    results, config = {}, replace(DENSE, qk_norm=qk_norm)
    for name, kernels, dtype in (
        ("liger", "liger", torch.float32),
        ("torch", "torch", torch.float32),
        ("exact", "torch", torch.float64),
    ):
        shape = AttentionShape(
            device=torch.device("cuda"),
            dtype=dtype,
            head_size=16,
            num_heads=4,
            num_kv_heads=2,
            seq_len=64,
            micro_batch_size=2,
        )
        attention = get_attention("sdpa", shape)
        policies = (SELECTIVE,) * config.num_layers if recompute else None
        model = Transformer(config, build_ops(kernels, attention), policies)
        model.initialize(0)
        model.to("cuda", dtype)
        generator = torch.Generator().manual_seed(1)
        inputs, targets = torch.randint(128, (2, 2, 64), generator=generator).cuda()
        output = model(inputs, targets)
        output.loss.backward()
        results[name] = {n: p.grad for n, p in model.named_parameters()} | {"loss": output.loss}
    for name, exact in results["exact"].items():
        # Many roundings add up over two layers: the floor is 32 eps rather than one op's 4.
        assert_as_accurate_as_torch(
            name, results["liger"][name], results["torch"][name], exact, floor_eps=32.0
        )
