"""Hamner stands beside other trainers, with the same weights, batches, optimizer and precision.

    pytest bench/test_trainers.py --benchmark-only

A row first compares the gradients of one whole batch with a plain model's in fp32, and is not timed
if they are more than twice as far from them as a plain model's in bf16. The losses that balance a
mixture's experts are computed, but weigh nothing: they depend on the rows they see together, and
the reference sees fewer. `extra_info` is that of test_options.py, with this error and its limit.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench import scale, steps
from bench.baselines import (
    Contender,
    Hamner,
    HuggingFace,
    Plain,
    Reference,
)
from bench.compile_ahead import few_layers
from bench.test_options import capacity_gib, configure
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.data.tokenizer import load_tokenizer
from hamner.hardware import GIB
from hamner.train.data import open_loader
from hamner.train.step import StepDoesNotFit

pytestmark = pytest.mark.needs_gpu

BATCHES = 8


def compiled(config: TrainConfig) -> Contender:
    """The function gives a plain model, torch.compile around all of it."""
    return Plain(config.model)


def budgeted(memory_budget: float, config: TrainConfig) -> Contender:
    """The function gives a plain model, compiled block by block, under an activation memory
    budget."""
    return Plain(config.model, memory_budget)


def hugging_face(config: TrainConfig) -> Contender:
    """The function gives transformers' Llama or Mixtral."""
    return HuggingFace(config.model)


def hugging_face_liger(config: TrainConfig) -> Contender:
    """The function gives transformers' Llama on Liger's kernels."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    if scale.SMOKE:
        pytest.skip("Liger's kernels need a GPU")
    return HuggingFace(config.model, liger=True)


TRAINERS: dict[str, Callable[[TrainConfig], Contender]] = {
    "hamner": Hamner,
    "compiled": compiled,
    "compiled, memory budget 0.5": functools.partial(budgeted, 0.5),
    "compiled, memory budget 0.3": functools.partial(budgeted, 0.3),
    "Hugging Face": hugging_face,
    "Hugging Face + Liger": hugging_face_liger,
}
# Compiling a whole model takes a minute or more, and its step more memory than ours: where peers
# are held against us within the same memory, the ones with a budget are enough.
ROWS = [
    *(("a", trainer) for trainer in TRAINERS),
    *itertools.product(
        ("current", "b"), ("hamner", "compiled, memory budget 0.5", "Hugging Face + Liger")
    ),
    *(("c", name) for name in ("hamner", "Hugging Face")),
]
QUICK = {("a", "hamner"), ("a", "compiled, memory budget 0.5"), ("a", "Hugging Face + Liger")}


def comparable(option: str, vram_budget: float | None = None) -> TrainConfig:
    """The function gives the option as all its trainers train it."""
    config = configure(option, "auto", vram_budget)
    return replace(
        config, model=replace(config.model, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    )


@functools.cache
def batches_of(option: str) -> tuple[Batch, ...]:
    """The function gives the first batches of the built-in corpus, the same for every trainer."""
    config = comparable(option)
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    loader = open_loader(config, tokenizer, pin_memory=not steps.is_cpu())
    with contextlib.closing(loader):
        return tuple(itertools.islice(loader, BATCHES))


@functools.cache
def reference_of(option: str) -> Reference:
    """The gradients that every trainer of an option must agree with."""
    return Reference(comparable(option).model, batches_of(option)[0])


@pytest.mark.parametrize(
    ("option", "trainer"),
    [pytest.param(*row, marks=[pytest.mark.quick] if row in QUICK else []) for row in ROWS],
)
def test_trainer(benchmark, option, trainer, vram_budget, does_not_fit):
    benchmark.group = f"trainers {option}"
    config = comparable(option, vram_budget)
    if scale.COMPILE_ONLY and trainer != "compiled":
        config = few_layers(config)
    if vram_budget is not None and not steps.is_cpu():
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram_budget / total))
    try:
        with steps.clean_memory():
            compare_and_measure(benchmark, config, trainer)
    except (torch.OutOfMemoryError, StepDoesNotFit):
        does_not_fit(f"{option} {trainer}", None, capacity_gib(vram_budget))


def compare_and_measure(benchmark, config: TrainConfig, trainer: str) -> None:
    """The function builds a trainer, compares its gradients, then times its steps."""
    reference = None if scale.COMPILE_ONLY else reference_of(config.option)
    started = time.perf_counter()
    contender = TRAINERS[trainer](config)
    try:
        if reference is not None:
            error, most = reference.error_of(contender), reference.max_error
            assert error <= most, f"not timed: gradients are off by {error:.1%}, allowed {most:.1%}"
            benchmark.extra_info.update(
                kind="trainer",
                option=config.option,
                trainer=trainer,
                gradient_error=round(error, 5),
                max_gradient_error=round(most, 5),
            )
        batches = itertools.cycle(batches_of(config.option))
        steps.measure(benchmark, lambda: contender.step(next(batches)), config, started=started)
    finally:
        contender.close()
