"""`--matmul int8` on a GPU: no waits, a loss as without, the memory, another start."""

import gc
from dataclasses import replace

import pytest
import torch

from hamner.config.options import for_option
from hamner.hardware import GIB
from hamner.kernels.int8_linear import OPERANDS
from hamner.model.int8 import Operand
from hamner.train.loop import train
from hamner.train.step import TrainStep
from tests.train.test_loop import metrics
from tests.train.test_loop_gpu import (
    KINDS,
    assert_step_never_waits,
    peak_of_steps,
    random_batch,
    tiny_config,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matmul", ["int8", "int8-all"])
def test_a_step_never_waits_for_the_gpu(tmp_path, kind, matmul):
    config = tiny_config(tmp_path)
    model = replace(config.model, **KINDS[kind])
    config = replace(config, model=model, matmul=matmul, micro_batch_size=4, attention="triton")
    assert_step_never_waits(config)


def test_it_trains_as_bf16_does(tmp_path):
    config = replace(tiny_config(tmp_path), attention="triton")
    losses = {}
    for matmul, seed in (("bf16", 0), ("bf16", 1), ("int8", 0), ("int8-all", 0)):
        run_dir = tmp_path / f"{matmul}{seed}"
        settings = replace(config, matmul=matmul, seed=seed, run_dir=run_dir)
        losses[matmul, seed] = train(settings).val_loss
    noise = abs(losses["bf16", 0] - losses["bf16", 1])
    for matmul in ("int8", "int8-all"):
        assert 0 < abs(losses[matmul, 0] - losses["bf16", 0]) < max(noise, 0.02)


def test_a_run_may_go_on_with_another(tmp_path):
    config = replace(tiny_config(tmp_path), attention="triton", log_every=5)
    train(replace(config, matmul="int8", stop_after=10))
    train(replace(config, matmul="int8-all", stop_after=5, resume=True))
    train(replace(config, resume=True))
    operands = {
        row["step"]: set(row.get("int8", {}).get("o", {})) for row in metrics(config.folder)
    }
    assert operands[10] == set(list(OPERANDS)[:4])
    assert operands[15] == set(OPERANDS)
    assert operands[max(operands)] == set()


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.xdist_group("most of the GPU's memory")
def test_it_takes_at_most_two_percent_more_memory(recompute, record_property):
    """And within 4% of its account, as bf16 does."""
    option = replace(
        for_option("a"), recompute=recompute, micro_batch_size=24, attention="triton", device="cuda"
    )
    batch = random_batch(option)
    accounts, peaks = {}, {}
    for matmul in ("bf16", "int8", "int8-all"):
        config = replace(option, matmul=matmul)
        gc.collect()  # a step hangs on itself, and its weights and moments with it
        torch.cuda.empty_cache()
        step = TrainStep(config)
        step.launch_one_by_one()
        peaks[matmul] = peak_of_steps(step, batch, 2)
        accounts[matmul] = step.plan.account.total
        step.close()
        del step
    record_property(
        "memory of int8",
        [
            f"{matmul:9} {recompute:10} predicted {accounts[matmul] / GIB:6.2f} GiB, "
            f"measured {peak / GIB:6.2f} GiB, {peak / peaks['bf16'] - 1:+.2%} to bf16"
            for matmul, peak in peaks.items()
        ],
    )
    for matmul, peak in peaks.items():
        assert peak <= 1.02 * peaks["bf16"], (matmul, peaks)
        assert accounts[matmul] == pytest.approx(peak, rel=0.04), (matmul, peaks)


def test_an_operand_falls_back_and_the_graph_is_recorded_anew(tmp_path):
    config = replace(tiny_config(tmp_path), matmul="int8-all", attention="triton")
    step, batch = TrainStep(config), random_batch(config)
    for _ in range(4):
        before = step.step(batch, 1e-3).int8.clone()
    assert step.is_graphed and step.is_warm
    fallen = [Operand(1, "down", "input"), Operand(0, "qkv", "gradient_transposed")]
    step.fall_back(fallen)
    assert not step.is_warm
    for _ in range(4):
        result = step.step(batch, 1e-3)
    assert step.is_warm
    step.close()
    assert torch.isfinite(result.grad_norm)
    operands = step.model.int8.operands
    measured = result.int8[..., 1].flatten() > 0
    unmeasured = {operands[i][:2] for i in (~measured).nonzero().flatten().tolist()}
    assert unmeasured == {(1, "down"), (0, "qkv")}
    errors = (before[..., 0] / before[..., 1]).sqrt()
    assert ((errors > 1e-3) & (errors < 0.05)).all()


def test_evaluations_are_bf16(tmp_path):
    """A forward pass without gradients has nothing of int8."""
    step = TrainStep(replace(tiny_config(tmp_path), matmul="int8", attention="triton"))
    inputs, targets, _ = step.to_device(random_batch(step.config), slice(0, 2))
    with torch.no_grad():
        loss = step.model(inputs, targets).cross_entropy
    trained = step.model(inputs, targets).cross_entropy
    step.model.int8 = None
    with torch.no_grad():
        assert step.model(inputs, targets).cross_entropy == loss != trained
    step.close()
