"""The rows say what a save in the background costs the training beside it.

    pytest bench/test_background_save.py --benchmark-only

Timed is the training that goes on from the moment a save is taken until it is on disk. The excess
over as many undisturbed steps is what one save costs, shown as a share of ten minutes.
"""

import contextlib
import statistics
import time

import pytest
import torch

from hamner.checkpoint.writer import BackgroundSaver
from hamner.config.options import for_option
from hamner.data.loader import TrainLoader
from hamner.profile.steps import LR, open_steps
from hamner.train.optimizer import join_masters
from hamner.train.step import TrainStep

TEN_MINUTES = 600.0
UNDISTURBED_STEPS = 10
SAVES = 2


@pytest.mark.parametrize("option", ["tiny", "a"])
def test_save_beside_training(benchmark, option, tmp_path):
    if option != "tiny" and not torch.cuda.is_available():
        pytest.skip("option a needs a GPU")
    config = for_option(option)
    saver = BackgroundSaver(
        tmp_path,
        keep=config.keep,
        keep_every=config.keep_every,
        join_masters=join_masters,
    )
    with contextlib.closing(saver), open_steps(config) as (step, loader):
        measure(benchmark, saver, step, loader)


def measure(benchmark, saver: BackgroundSaver, step: TrainStep, loader: TrainLoader) -> None:
    """The excess of steps beside saves over undisturbed ones is put into `extra_info`."""
    option, device = step.config.option, step.compute.name

    def train_until(is_enough) -> list[float]:
        """The function gives the seconds of each step."""
        seconds = []
        while not is_enough(len(seconds)):
            started = time.perf_counter()
            step.step(next(loader), LR).grad_norm.item()  # so that each step's time is its own
            seconds.append(time.perf_counter() - started)
        return seconds

    def begin_save() -> None:
        state = step.optimizer.state_tensors()
        model = step.model.state_dict()
        saver.begin(step.steps_taken, model=model, optimizer=state, state={})

    excesses, steps_beside = [], []

    def save_beside_training() -> None:
        started = time.perf_counter()
        begin_save()
        begun = time.perf_counter() - started
        seconds = train_until(lambda _: saver.collect() is not None)
        excesses.append(begun + sum(seconds) - len(seconds) * normal)
        steps_beside.append(len(seconds))

    train_until(lambda steps: steps == 4)  # compile, record the graph
    begin_save()  # makes the host buffers
    saver.wait()
    normal = statistics.median(train_until(lambda steps: steps == UNDISTURBED_STEPS))
    benchmark.pedantic(save_beside_training, rounds=SAVES, iterations=1)
    cost = statistics.median(excesses)
    benchmark.extra_info |= {
        "device": device,
        "step_seconds": normal,
        "steps_beside_a_save": statistics.median(steps_beside),
        "cost_of_a_save_seconds": cost,
        "share_of_ten_minutes": cost / TEN_MINUTES,
    }
    print(
        f"{option} on {device}: a save costs {cost:.2f} s of training, "
        f"{cost / TEN_MINUTES:.2%} of ten minutes; it takes {statistics.median(steps_beside)} steps"
    )
