"""Two GPUs replay what they launch one by one, train as one GPU does, and never wait."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hamner.config.options import for_option
from hamner.config.train import TrainConfig
from hamner.model.int8 import Operand
from hamner.parallel.processes import open_processes
from hamner.profile.steps import LR, open_steps, synchronize, warm_up
from tests.parallel.jobs import enter, run_job, said, train_together
from tests.train.test_loop import metrics
from tests.waiting import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("parallel"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

STEPS = 24
"""of which DDP records the twelfth"""
ENGINES = ("ddp", "fsdp")
KINDS = {"dense": {}, "mixture": {"num_experts": 4, "num_experts_per_token": 2}}


def tiny_config(folder, **changes) -> TrainConfig:
    config = for_option("tiny")
    return replace(
        config,
        run_dir=folder,
        steps=STEPS,
        micro_batch_size=config.batch_size // 2,
        log_every=1,
        eval_every=8,
        eval_tokens=2_048,
        save_every=0,
        sample_every=0,
        attention="triton",
        device="cuda",
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[str, str], list[dict]]:
    """Metrics are by kind and run: one GPU with two micro-batches a step, two with one each."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = {}, {}
    for kind, changes in KINDS.items():
        model = replace(for_option("tiny").model, **changes)
        one[kind, "one"] = tiny_config(folder / f"{kind}_one", model=model)
        for engine in ENGINES:
            for graph in (True, False):
                name = engine if graph else f"{engine} launched one by one"
                run_dir = folder / f"{kind}_{name}".replace(" ", "_")
                two[kind, name] = tiny_config(
                    run_dir, model=model, parallel=engine, cuda_graph=graph
                )
    train_together(list(one.values()), 1, folder / "one", timeout=120)
    train_together(list(two.values()), 2, folder / "two", timeout=240)
    return {key: metrics(config.run_dir) for key, config in (one | two).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_replayed_step_has_the_bits_of_one_launched_kernel_by_kernel(kind, engine, runs):
    replayed, launched = runs[kind, engine], runs[kind, f"{engine} launched one by one"]
    for name in ("loss", "grad_norm", "val_loss"):
        assert [r[name] for r in replayed] == [r[name] for r in launched], name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_train_as_one(kind, engine, runs):
    """They agree within the noise of bf16: one GPU adds its gradients up in fp32."""
    assert len(runs[kind, engine]) == len(runs[kind, "one"]) == STEPS
    for expected, found in zip(runs[kind, "one"], runs[kind, engine], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=0.02)
        # AdamW would hide it if gradients were twice or half of what they should be.
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)


def test_a_step_never_waits_for_the_gpu(tmp_path):
    codes = run_job(step_without_waiting, 2, tmp_path, timeout=180)
    assert codes == [0, 0], said(tmp_path, 2)


def step_without_waiting(ports: list[int]) -> None:
    """The function is the body of a process."""
    for engine in ENGINES:
        for micro_batches in (1, 2):
            config = tiny_config(None, parallel=engine)
            config = replace(config, micro_batch_size=config.micro_batch_size // micro_batches)
            enter(ports)
            with (
                open_processes(config) as processes,
                open_steps(config, processes) as (step, loader),
            ):
                assert step.is_graphed == (micro_batches == 1)
                warm_up(step, loader, 3)
                batch = next(loader)
                synchronize(step)
                with no_waiting():
                    result = step.step(batch, LR)
                assert torch.isfinite(result.loss)


def test_int8_falls_back_on_both_and_is_recorded_anew(tmp_path):
    """The steps around it have the bits of those that are launched kernel by kernel."""
    codes = run_job(steps_around_a_fall_back, 2, tmp_path, tmp_path, timeout=180)
    assert codes == [0, 0], said(tmp_path, 2)
    losses = {
        graph: [torch.load(tmp_path / f"{graph}_{rank}.pt") for rank in range(2)]
        for graph in (True, False)
    }
    assert torch.equal(losses[True][0], losses[True][1])
    assert torch.equal(losses[True][0], losses[False][0])


def steps_around_a_fall_back(ports: list[int], folder: Path) -> None:
    """The function is the body of a process."""
    for graph in (True, False):
        config = tiny_config(None, parallel="ddp", matmul="int8", cuda_graph=graph)
        enter(ports)
        with (
            open_processes(config) as processes,
            open_steps(config, processes) as (step, loader),
        ):
            losses = []
            for fallen in ([], [Operand(1, "down", "input")]):
                step.fall_back(fallen)
                assert step.is_warm == (not graph)
                losses += [step.step(next(loader), LR).loss for _ in range(STEPS // 2 + 2)]
                assert step.is_warm
            torch.save(
                torch.stack(losses).cpu(), folder / f"{graph}_{processes.rank.global_rank}.pt"
            )
