"""What a save in the background costs the training beside it.

    pytest bench/test_background_save.py --benchmark-only

Timed is the training that goes on from the moment a save is taken until it is on disk. The excess
over as many undisturbed steps is what one save costs, shown as a share of ten minutes.
"""

import statistics
import time
from dataclasses import replace

import pytest
import torch

from hamner.checkpoint.run_folder import RunFolder
from hamner.config.options import for_option
from hamner.train.loop import TrainingLoop

TEN_MINUTES = 600.0
UNDISTURBED_STEPS = 10
SAVES = 2


@pytest.mark.parametrize("option", ["tiny", "a"])
def test_save_beside_training(benchmark, option, tmp_path):
    if option != "tiny" and not torch.cuda.is_available():
        pytest.skip("option a needs a GPU")
    config = replace(for_option(option), run_dir=tmp_path / "run")
    loop = TrainingLoop(config, RunFolder(config.folder))

    def train_until(is_enough) -> list[float]:
        """Seconds of each step."""
        seconds = []
        while not is_enough(len(seconds)):
            started = time.perf_counter()
            batch = next(loop.data.loader)
            result = loop.step.step(batch, 1e-4)
            loop.progress.step += 1
            loop.log.record(loop.progress.step, 0, lr=1e-4, batch=batch, result=result)
            result.grad_norm.item()  # so that each step's time is its own
            seconds.append(time.perf_counter() - started)
        return seconds

    def save() -> None:
        loop.saves.save_best(loop.progress.step, is_healthy=True)
        loop.saves.saver.wait()

    excesses, steps_beside = [], []

    def save_beside_training() -> None:
        started = time.perf_counter()
        loop.saves.save(loop.progress.step)
        begun = time.perf_counter() - started
        seconds = train_until(lambda _: loop.saves.saver.collect() is not None)
        excesses.append(begun + sum(seconds) - len(seconds) * normal)
        steps_beside.append(len(seconds))

    try:
        train_until(lambda steps: steps == 4)  # compile, record the graph
        save()  # makes the host buffers
        normal = statistics.median(train_until(lambda steps: steps == UNDISTURBED_STEPS))
        benchmark.pedantic(save_beside_training, rounds=SAVES, iterations=1)
    finally:
        loop.close()
    cost = statistics.median(excesses)
    benchmark.extra_info |= {
        "device": loop.step.compute.name,
        "step_seconds": normal,
        "steps_beside_a_save": statistics.median(steps_beside),
        "cost_of_a_save_seconds": cost,
        "share_of_ten_minutes": cost / TEN_MINUTES,
    }
    print(
        f"{option} on {loop.step.compute.name}: a save costs {cost:.2f} s of training, "
        f"{cost / TEN_MINUTES:.2%} of ten minutes; it takes {statistics.median(steps_beside)} steps"
    )
