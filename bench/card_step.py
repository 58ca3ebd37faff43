"""What a report card says of training: option a at its defaults, and the GPU under that load."""

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from bench.conditions import nvidia_smi
from hamner.config.options import for_option
from hamner.hardware import Gpu
from hamner.plan.efficiency import Efficiency
from hamner.plan.memory import describe
from hamner.plan.report_card import StepMeasurement
from hamner.plan.step_time import predict
from hamner.profile.steps import open_steps, time_steps, warm_up

WARM_UP_STEPS, STEPS, STEPS_SHOWN = 4, 60, 20
SECONDS = 1.0
"""between two looks at the GPU"""


@dataclass
class Load:
    """The load is what nvidia-smi said while a GPU worked, once a second."""

    clock_mhz: list[float] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    temperature_c: list[float] = field(default_factory=list)

    def look(self) -> None:
        """The method notes clock, power and temperature, as far as they are said."""
        values = nvidia_smi("clocks.sm", "power.draw", "temperature.gpu") or []
        columns = (self.clock_mhz, self.power_w, self.temperature_c)
        for column, value in zip(columns, values, strict=False):
            with contextlib.suppress(ValueError):  # [N/A]
                column.append(float(value))


@contextlib.contextmanager
def watched() -> Iterator[Load]:
    """While it is open, a thread looks at the GPU."""
    load, stop = Load(), threading.Event()

    def watch() -> None:
        while not stop.wait(SECONDS):
            load.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield load
    finally:
        stop.set()
        thread.join()


def measure_step(
    gpu: Gpu, reached: Efficiency, attention: str, say: Callable[[str], None]
) -> tuple[StepMeasurement, Load]:
    """The function trains option a, and says how far it is.

    Args:
        gpu: what its speed is projected for.
        reached: the efficiencies to project it with.
        attention: as `--attention`.
        say: takes a line of progress.

    Raises:
        UserError: it does not fit this GPU.
    """
    config = replace(for_option("a"), attention=attention)
    torch.cuda.reset_peak_memory_stats()
    with open_steps(config) as (step, loader):
        batches, times = iter(loader), []
        say(f"option a: {step.plan}, attention {step.attention.name}")
        warm_up(step, batches, WARM_UP_STEPS)
        with watched() as load:
            while len(times) < STEPS:
                times += time_steps(step, batches, STEPS_SHOWN)
                speed = config.tokens_per_step / statistics.median(times) * 1e3
                say(f"option a: step {len(times)} of {STEPS}, {speed:,.0f} tokens/s")
        plan, attention = step.plan, step.attention.name
    prediction = predict(config, gpu, plan.policies, plan.micro_batch_size, reached=reached)
    fast, *_, slow = statistics.quantiles(times, n=10)
    return (
        StepMeasurement(
            steps=STEPS,
            tokens_per_second=config.tokens_per_step / statistics.median(times) * 1e3,
            tokens_per_second_p10=config.tokens_per_step / slow * 1e3,
            tokens_per_second_p90=config.tokens_per_step / fast * 1e3,
            peak_bytes=torch.cuda.max_memory_allocated(),
            recompute=describe(plan.policies),
            micro_batch_size=plan.micro_batch_size,
            attention=attention,
            projected_low=prediction.interval.low,
            projected=prediction.tokens_per_second,
            projected_high=prediction.interval.high,
            projected_peak_bytes=plan.account.total,
        ),
        load,
    )
