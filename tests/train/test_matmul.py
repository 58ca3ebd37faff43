"""`--matmul int8` through the whole loop, with its kernels in Triton's interpreter."""

import functools
from dataclasses import replace

import pytest
import torch

from bench.int8_gradients import LINEAR_OPS
from bench.recipe_runs import fallen_operands
from hamner.checkpoint import format as checkpoint
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.kernels.int8_linear import OPERANDS
from hamner.model.attention import AttentionBackend
from hamner.model.ops import Ops, build_ops
from hamner.parallel import device
from hamner.train import health, int8_guard
from hamner.train import step as train_step
from hamner.train.evaluation import validation_loss
from hamner.train.health import StepReading
from hamner.train.loop import train
from hamner.train.replay import replay
from hamner.train.step import TrainStep
from tests.parallel.jobs import enter, run_job, said
from tests.train.test_loop import metrics, small_config

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has test_matmul_gpu.py"),
    pytest.mark.timeout(300),
]

_select = device.select


def select(config: TrainConfig) -> device.Compute:
    """The CPU takes part, which no user can ask for."""
    return _select(replace(config, matmul="bf16"))


def linears_only(kernels: str, attention: AttentionBackend) -> Ops:
    """Ops with a linear layer are kernels, the others plain torch, which is faster here."""
    ours = build_ops("triton", attention)
    linears = {name: getattr(ours, name) for name in LINEAR_OPS}
    return replace(build_ops(kernels, attention), **linears)


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setattr(device, "select", select)
    monkeypatch.setattr(train_step, "build_ops", linears_only)
    small = small_config(tmp_path)
    return replace(
        small,
        model=replace(small.model, num_layers=1, expert_intermediate_size=32, max_seq_len=16),
        attention="sdpa",
        matmul="int8-all",
        recompute="selective",
        seq_len=16,
        batch_size=2,
        micro_batch_size=1,
        steps=4,
        log_every=1,
        eval_every=4,
        eval_tokens=32,
    )


def test_a_run_logs_errors_falls_back_and_goes_on(config, monkeypatch, capsys):
    monkeypatch.setattr(int8_guard, "MAX_ERROR", 0.0)
    train(replace(config, stop_after=1))
    train(replace(config, stop_after=2, resume=True))
    rows = metrics(config.run_dir)
    assert list(rows[0]["int8"]) == ["qkv", "o", "gate_up", "down"]
    for errors in rows[0]["int8"].values():
        assert list(errors) == list(OPERANDS)
        assert all(0.001 < error < 0.02 for (error,) in errors.values())
    assert [any(row["int8"].values()) for row in rows] == [True, True, False]
    said = " ".join(capsys.readouterr().out.split())
    assert "matmuls are bf16 from step 3 on" in said
    how = "--matmul int8-all: linear layers in int8 forward and for the gradients of activations"
    assert said.count(f"{how} and weights") == 2
    assert said.count(f"{how} and weights; 12 of their matmuls fell back to bf16 before") == 1
    state = checkpoint.find(config.run_dir / "checkpoints")[-1].state()
    assert ["qkv", "input", 3] in [row[1:] for row in state["int8_fallback"]]
    assert fallen_operands(config.run_dir) == state["int8_fallback"]
    # A replay multiplies as the step did.
    tokens = torch.randint(100, (2, 1, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(*tokens, torch.zeros(1, 16, dtype=torch.int32))
    losses = {}
    for step in (2, 3):
        health.keep(config.run_dir / "bad_steps", StepReading(step, 0, 1e-3, batch))
        again = replace(config, replay=config.run_dir / f"bad_steps/step_{step:08d}.safetensors")
        by_matmul = (replay(replace(again, matmul=matmul)) for matmul in ("int8-all", "bf16"))
        losses[step] = [found.losses for found in by_matmul]
    assert losses[2][0] != losses[2][1] and losses[3][0] == losses[3][1]
    # Also through a start in bf16.
    train(replace(config, resume=True, matmul="bf16"))
    newest = checkpoint.find(config.run_dir / "checkpoints")[-1].state()
    assert newest["int8_fallback"] == state["int8_fallback"]
    assert "int8" not in metrics(config.run_dir)[-1]


def test_evaluations_are_bf16(config):
    """Weights are evaluated as they will be used."""
    step = TrainStep(replace(config, matmul="int8"))
    inputs, targets = torch.randint(100, (2, 2, 16))
    rows = Batch(inputs, targets, torch.zeros(2, 16, dtype=torch.int32))
    loss = validation_loss(step, rows)
    trained = step.model(inputs, targets).cross_entropy.item()
    step.model.int8 = None
    assert validation_loss(step, rows) == loss != trained
    assert loss == pytest.approx(trained, abs=0.01)


def test_operands_that_fall_back_one_by_one_stay_compiled(config, monkeypatch):
    """Torch compiles a function a few times only and then runs it as it is, without a word."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    step = TrainStep(replace(config, compile=True))
    inputs, targets = torch.randint(100, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    rows = Batch(inputs, targets, torch.zeros(2, 16, dtype=torch.int32))
    step.step(rows, 0.0)
    assert 0 < len(graphs) <= 2
    graphs.clear()
    step.fall_back(step.model.int8.operands[:2])
    step.step(rows, 0.0)
    assert graphs
    torch.compiler.reset()


def test_another_plan_begins_without_the_errors_of_a_step_that_broke_off(config):
    step = TrainStep(config)
    int8 = step.model.int8
    int8.errors.grad = torch.full_like(int8.errors, torch.nan)
    step.follow(step.plan)
    assert int8.take_errors().eq(0).all()


def train_all(ports: list[int], configs: list[TrainConfig]) -> None:
    """The body of a process of a job."""
    device.select, train_step.build_ops, int8_guard.MAX_ERROR = select, linears_only, 0.0
    for each in configs:
        enter(ports)
        train(each)


def test_two_processes_train_as_one(config, tmp_path, monkeypatch):
    """With DDP every process sees the errors of all, and falls back at the same step."""
    monkeypatch.setattr(int8_guard, "MAX_ERROR", 0.0)
    single, job = (
        replace(config, run_dir=tmp_path / name, matmul="int8", steps=3, eval_every=0)
        for name in ("one", "two")
    )
    train(single)
    codes = run_job(train_all, 2, tmp_path, [replace(job, parallel="ddp")])
    assert codes == [0, 0], said(tmp_path, 2)
    rows = list(zip(metrics(single.run_dir), metrics(job.run_dir), strict=True))
    assert [any(found["int8"].values()) for _, found in rows] == [True, True, False]
    for expected, found in rows:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for linear, errors in expected["int8"].items():
            for name, (error,) in errors.items():
                assert found["int8"][linear][name][0] == pytest.approx(error, rel=0.02)
