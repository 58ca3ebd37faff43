"""A row about a whole trainer has the figures of what a training step costs and reaches."""

import gc
import statistics
import time
from collections.abc import Callable, Hashable
from contextlib import contextmanager

import torch

from bench import scale
from hamner.config.train import TrainConfig
from hamner.hardware import GIB, identify
from hamner.plan.costs import flops_per_token
from hamner.profile.steps import LR, open_steps, take, time_calls

WARM_UP_STEPS = 4
"""compilation, launch tables, the allocator; the third step records a CUDA graph"""
STEPS, STEPS_ON_CPU = 14, 4


def measure(benchmark, step: Callable[[], object], config: TrainConfig, *, started: float) -> None:
    """The function warms up, then times steps that follow each other without waiting, into
    `extra_info`.

    Args:
        benchmark: the fixture.
        step: one optimizer step.
        config: of that step.
        started: `time.perf_counter()` before the trainer was built.
    """
    if scale.COMPILE_ONLY:
        step()
        synchronize()
        return
    built = time.perf_counter()
    # From before the warm-up: replays of a CUDA graph allocate nothing, only its recording does.
    reset_peak()
    for _ in range(1 if is_cpu() else WARM_UP_STEPS):
        step()
    synchronize()
    warm = time.perf_counter()
    milliseconds: list[float] = []

    def steps() -> None:
        count = STEPS_ON_CPU if is_cpu() else STEPS
        milliseconds.extend(time_calls(step, count, on_gpu=not is_cpu()))

    benchmark.pedantic(steps)
    median = statistics.median(milliseconds)
    deciles = statistics.quantiles(milliseconds, n=10)
    speed = config.tokens_per_step / median * 1e3
    benchmark.extra_info.update(
        tokens_per_second=round(speed),
        mfu=mfu(config, speed),
        p10_ms=round(deciles[0], 3),
        p50_ms=round(median, 3),
        p90_ms=round(deciles[-1], 3),
        build_seconds=round(built - started, 2),
        warm_up_seconds=round(warm - built, 2),
        **peak(),
    )


def measure_run(
    benchmark,
    config: TrainConfig,
    trainer: str,
    *,
    first_losses: dict[Hashable, float],
    key: Hashable,
    max_error: float = 0.0,
) -> None:
    """The function times whole steps of a run on its own data, if their first loss is as expected.

    Args:
        benchmark: the fixture.
        config: of the run.
        trainer: its name in the table.
        first_losses: of the first row with each key, which the other rows' must be.
        key: of rows with the same weights and batches.
        max_error: nats by which a first loss may differ.
    """
    started = time.perf_counter()
    with clean_memory(), open_steps(config) as (step, loader):
        loss = step.step(next(loader), LR).loss.item()
        expected = first_losses.setdefault(key, loss)
        assert abs(loss - expected) <= max_error, f"not timed: loss {loss}, not {expected}"
        benchmark.extra_info.update(
            kind="trainer", option=config.option, trainer=trainer, first_loss=round(loss, 5)
        )
        measure(benchmark, lambda: take(step, loader, 1), config, started=started)


def is_cpu() -> bool:
    """The function says whether trainers run on the CPU."""
    return scale.SMOKE or not torch.cuda.is_available()


def mfu(config: TrainConfig, tokens_per_second: float) -> float | None:
    """The function gives the share of the bf16 peak, causal FLOPs; None where the peak is
    unknown."""
    gpu = None if is_cpu() else identify(torch.cuda.get_device_name())
    if gpu is None:
        return None
    flops = tokens_per_second * flops_per_token(config.model, config.seq_len)
    return round(flops / (gpu.bf16_tflops * 1e12), 4)


def synchronize() -> None:
    """The function waits for the GPU, if rows use one."""
    if not is_cpu():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """The function counts the peak from here."""
    if not is_cpu():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, float]:
    """The function gives GiB at the peak: allocated by tensors, reserved from the driver."""
    if is_cpu():
        return {}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


@contextmanager
def clean_memory():
    """While it is open, and when it closes, nobody else holds memory of the GPU."""
    free_memory()
    try:
        yield
    finally:
        free_memory()


def free_memory() -> None:
    """What the last row held is returned."""
    gc.collect()
    if not is_cpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
