"""Measure what this GPU reaches, in minutes, for an issue and for plans.

    python -m bench.report_card [--out FOLDER] [--as-capability 8.6]

Environment, clocks and power; ceilings; the kernels of bf16 training with AdamW against their
floors and predictions; option a at its defaults, projected against measured. The folder gets
report_card.md and report_card.json, from which `hamner.plan --report-card` plans.
"""

import contextlib
import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import triton

from bench import card_kernels, ceilings
from bench.as_capability import as_capability
from bench.card_step import Load, measure_step, watched
from bench.card_text import to_markdown
from bench.conditions import conditions
from bench.timing import use_recordable_stream
from hamner.cli import read_flags, run_command
from hamner.errors import UserError
from hamner.files import require_writable, write_whole, writing
from hamner.hardware import identify
from hamner.plan.measured_efficiency import changed_power_limit, known_gpu
from hamner.plan.report_card import Device, ReportCard

T = TypeVar("T")
FILES = PAGE, CARD = "report_card.md", "report_card.json"


@dataclass(frozen=True)
class ReportCardConfig:
    """Measure what this GPU reaches, in minutes, for an issue and for plans."""

    out: Path = Path("report-card")
    """folder to write report_card.md and report_card.json into"""
    as_capability: str | None = None
    """measure the kernels of this older capability, such as 8.6, whose code a newer GPU executes"""


class Progress:
    """The progress is a line at a time, with the seconds since the start."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __call__(self, line: str) -> None:
        print(f"[{time.perf_counter() - self.started:4.0f} s] {line}", flush=True)

    def each(self, items: Iterator[T], describe: Callable[[T], str]) -> tuple[T, ...]:
        """The method says each result, and gives them all; memory is free again after each."""
        found = []
        for item in items:
            self(describe(item))
            found.append(item)
            torch.cuda.empty_cache()
        return tuple(found)


def describe_device() -> Device:
    """The function gives the GPU, its driver and its limits."""
    properties, said = torch.cuda.get_device_properties(), conditions()

    def number(name: str) -> float | None:
        try:
            return float(said[name])
        except (KeyError, ValueError):
            return None

    return Device(
        gpu=torch.cuda.get_device_name(),
        capability=(properties.major, properties.minor),
        compiled_for=torch.cuda.get_device_capability(),
        driver=said.get("driver", "unknown"),
        torch=torch.__version__,
        triton=triton.__version__,
        memory_bytes=properties.total_memory,
        power_limit_w=number("power_limit_w"),
        max_clock_mhz=number("max_sm_clock_mhz"),
        load_clock_mhz=None,
    )


def with_clock(device: Device, load: Load) -> Device:
    """The function notes the clock of a load, if it is known."""
    if not load.clock_mhz:
        return device
    return dataclasses.replace(device, load_clock_mhz=statistics.median(load.clock_mhz))


def measure_ceilings(say: Progress) -> tuple[ReportCard, Load]:
    """The function measures all but kernels and training, and watches the GPU get warm."""
    say("keeping the GPU busy until it is warm")
    with watched() as load:
        card_kernels.warm_up()
    device, copy = with_clock(describe_device(), load), ceilings.measure().copy_gb_per_s
    say(f"a copy: {copy:,.0f} GB/s")
    card = ReportCard(
        date=datetime.date.today().isoformat(),
        commit=conditions()["commit"],
        device=device,
        bandwidth_gbs=copy,
        matmuls=say.each(
            card_kernels.matmul_rates(),
            lambda rate: f"matmul {rate.m} x {rate.k} x {rate.n}: {rate.tflops:.1f} TFLOP/s",
        ),
        attention=say.each(
            card_kernels.attention_rates(),
            lambda rate: (
                f"attention {rate.direction}, T {rate.seq_len}, head size "
                f"{rate.head_size}: {rate.tflops:.1f} TFLOP/s"
            ),
        ),
        kernels=(),
        step=None,
    )
    return card, load


def measure(is_older: bool, say: Progress) -> tuple[ReportCard, dict[str, Load], list[str]]:
    """The function measures everything.

    Args:
        is_older: the kernels are those of an older GPU.
        say: shows how far it is.

    Returns:
        The card, what the GPU did under which load, and notes.
    """
    card, load = measure_ceilings(say)
    loads, (gpu, reached) = {"in matmuls of 8192^3": load}, known_gpu(card)
    notes = notes_on(card, is_older)
    card = dataclasses.replace(
        card,
        kernels=say.each(
            card_kernels.kernel_times(gpu, reached),
            lambda kernel: (
                f"{kernel.name}: {kernel.measured_ms:.3f} ms, floor {kernel.floor_ms:.3f}"
            ),
        ),
    )
    try:
        # Other attention would be the GPU's own code.
        attention = "triton" if is_older else "auto"
        step, loads["while training"] = measure_step(gpu, reached, attention, say)
    except UserError as error:
        notes.append(f"Option a does not train here: {error}")
        say(notes[-1])
    else:
        device = with_clock(card.device, loads["while training"])
        card = dataclasses.replace(card, step=step, device=device)
    return card, loads, notes


def notes_on(card: ReportCard, is_older: bool) -> list[str]:
    """The function says what the predictions are of."""
    device, notes = card.device, []
    known = identify(device.gpu)
    if known is None:
        notes.append(
            "Hamner's table lacks this GPU: its peak is taken to be the fastest matmul below, its "
            "bandwidth that of the copy, and its shares of them those of an RTX 3090."
        )
    elif limit := changed_power_limit(device, known):
        notes.append(
            f"The GPU is limited to {limit:g} W, where such cards are sold with "
            f"{known.power_w}: predictions are at this limit, floors are not."
        )
    if is_older:
        notes.append(
            "The kernels are those of compute capability {}.{}, executed on a newer GPU, which the "
            "floors and predictions are of. Attention in training is Triton's.".format(
                *device.compiled_for
            )
        )
    return notes


def main(args: Sequence[str]) -> None:
    """The command measures, and writes both files."""
    config = read_flags(ReportCardConfig, args, "bench.report_card")
    if not torch.cuda.is_available():
        raise UserError("no CUDA GPU found: a report card is measured on the GPU it is about")
    older = config.as_capability
    with as_capability(older) if older else contextlib.nullcontext():
        with writing(f"--out {config.out}"):
            config.out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            require_writable(config.out / name, "--out")
        use_recordable_stream()
        card, loads, notes = measure(older is not None, Progress())
    page = to_markdown(card, loads, notes)
    with writing(f"--out {config.out}"):
        card.write(config.out / CARD)
        write_whole(config.out / PAGE, page)
    print(page)
    print(
        f"wrote {config.out}/{PAGE} and {config.out}/{CARD}: attach both to an issue, plan with "
        f"python -m hamner.plan --option a --report-card {config.out}/{CARD}"
    )


if __name__ == "__main__":
    run_command(main)
