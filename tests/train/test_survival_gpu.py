"""Saves, resumes and bad steps on a GPU."""

import gc
import math
import threading
from dataclasses import replace

import pytest
import torch

from hamner.checkpoint.writer import BackgroundSaver
from hamner.config.train import TrainConfig
from hamner.train.log import MAX_PENDING
from hamner.train.loop import TrainingLoop, train
from tests.train.test_loop import metrics
from tests.train.test_loop_gpu import tiny_config
from tests.waiting import no_waiting

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return replace(tiny_config(tmp_path), log_every=1, attention="triton")


def test_a_save_copies_the_moment_and_waits_for_nothing(tmp_path):
    """The second save: the first one makes the host buffers."""
    weight = torch.zeros(1 << 20, device="cuda")
    saver = BackgroundSaver(tmp_path, keep=0, keep_every=0)

    def begin(step: int) -> None:
        saver.begin(
            step,
            model={"weight": weight},
            optimizer={"exp_avg.weight": weight},
            state={"step": step},
        )

    begin(1)
    saver.wait()
    weight.fill_(2.0)
    torch.cuda._sleep(500_000_000)
    with no_waiting():
        begin(2)
        weight.fill_(3.0)
    saved = saver.wait()
    saver.close()
    loaded = torch.zeros(1 << 20)
    saved.load_model({"weight": loaded})
    assert torch.equal(loaded, torch.full((1 << 20,), 2.0))


def test_a_finished_step_never_waits_for_the_gpu(config):
    """What follows the update: counters, the reading of the step, a save that is due."""
    is_saved, saves = threading.Event(), []

    def on_phase(phase: str, step: int) -> None:
        if phase == "save":
            saves.append(step)
        elif phase == "saved":
            is_saved.set()
        elif (phase, step) == ("data", 6):
            assert is_saved.wait(60)  # the first save makes the host buffers
        elif (phase, step) == ("data", 8):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        elif (phase, step) == ("data", 9):
            torch.cuda.set_sync_debug_mode("default")

    settings = replace(config, steps=10, log_every=100, eval_every=0, save_every=4)
    try:
        train(settings, on_phase=on_phase)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert saves == [4, 8, 10]


def test_a_save_in_the_background_does_not_change_the_run(config):
    train(config)
    saving = replace(config, run_dir=config.run_dir.with_name("saving"), save_every=2)
    train(saving)
    losses = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(folder)]
        for folder in (config.run_dir, saving.run_dir)
    ]
    assert losses[0] == losses[1]


BLOCK = 512
"""bytes of the smallest piece of memory that torch gives out"""


def peak_of(config: TrainConfig) -> int:
    """Beyond what other tests of the process, and earlier runs, still hold."""
    gc.collect()  # the trainer before, whose memory hangs on reference cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    train(config)
    return torch.cuda.max_memory_allocated() - held


def test_a_resumed_run_takes_no_more_memory_than_a_fresh_one(config):
    config = replace(config, eval_every=0)  # or only the steps of the second would have one
    train(replace(config, stop_after=6))  # what the first run in a process sets up for good
    fresh = replace(config, run_dir=config.run_dir.with_name("fresh"))
    first = peak_of(replace(fresh, stop_after=6))
    second = peak_of(replace(fresh, resume=True, stop_after=6))
    # How many readings of steps are under way at the peak depends on the host's speed.
    assert second <= first + (MAX_PENDING + 1) * BLOCK


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_may_move_between_gpu_and_cpu(config, devices):
    first, second = devices
    train(replace(config, device=first, attention="auto", stop_after=10))
    resumed = train(replace(config, device=second, attention="auto", resume=True))
    assert resumed.step == 20
    whole = train(replace(config, run_dir=config.run_dir.with_name("whole"), device="cuda"))
    assert resumed.tokens == whole.tokens
    # One half in fp32, the other in bf16: as far apart as those, not as another run.
    assert abs(resumed.val_loss - whole.val_loss) < 0.05


def test_a_bad_step_is_skipped_counted_and_kept(config):
    """Found when its numbers come in, and only its update is missing."""
    before = {}

    def on_phase(phase: str, step: int) -> None:
        if (phase, step) == ("data", 4):
            parameters = loop.step.optimizer.parameters
            before.update({name: p.clone() for name, p in parameters.items()})
            loop.step.model.norm.weight.data[0] = math.inf

    settings = replace(config, steps=4, eval_every=0)
    loop = TrainingLoop(settings, on_phase=on_phase)
    try:
        loop.run_to_end()
    finally:
        loop.close()
    assert [record["skipped_steps"] for record in metrics(config.run_dir)] == [0, 0, 0, 1]
    kept = [path.name for path in loop.run.bad_steps.iterdir()]
    assert kept == ["step_00000004.safetensors"]
    for name, parameter in loop.step.optimizer.parameters.items():
        if name != "norm.weight":
            assert torch.equal(parameter, before[name]), name
