"""Every option runs under every recompute policy: tokens/s against memory, on this card.

    pytest bench/test_options.py --benchmark-only [--vram-budget 24]

Real data through the real loader, the whole batch in one pass, some also in smaller micro-batches;
"auto" is what `hamner.train` would choose within the budget. What does not fit is reported with
what it needs. `extra_info` holds tokens/s (of the median step), MFU, the step's 10th, 50th and 90th
percentile, the peak allocated and reserved, and apart from them the seconds to build and to warm
up, with all that was not compiled ahead (bench/compile_ahead.py); beside speed and memory stands
what `hamner.plan` projects for this card.

The rows of an option share one `TrainStep`, which changes its recompute policies between them: only
the first one's build takes time.
"""

import contextlib
import itertools
import time
from dataclasses import replace

import pytest
import torch

from bench import scale, steps
from bench.compile_ahead import few_layers
from hamner.config.options import OPTIONS, for_option
from hamner.config.train import TrainConfig
from hamner.data.loader import TrainLoader
from hamner.errors import UserError
from hamner.hardware import GIB, RESERVE_GIB, identify
from hamner.plan import memory
from hamner.plan.memory import MemoryPlan
from hamner.plan.step_time import predict
from hamner.profile.steps import open_steps, take
from hamner.train import setup
from hamner.train.step import TrainStep

POLICIES = ("auto", "none", "selective", "full")
QUICK = {("a", "selective", 1), ("a", "full", 1), ("c", "selective", 1), ("tiny", "auto", 1)}
ON_CPU_TOO = {("tiny", "auto", 1)}
ACCUMULATED = [("a", "selective", 2), ("a", "selective", 4), ("c", "selective", 2)]
"""(option, policy, micro-batches a step), beside those in one pass"""


def marks(row: tuple[str, str, int]) -> list[pytest.MarkDecorator]:
    """The function gives the marks of a row."""
    quick = [pytest.mark.quick] if row in QUICK else []
    return quick if row in ON_CPU_TOO else [*quick, pytest.mark.needs_gpu]


def row_id(row: tuple[str, str, int]) -> str:
    """The name is option-policy, and the number of micro-batches if there are several."""
    option, policy, micro_batches = row
    return f"{option}-{policy}" + (f"-{micro_batches}" if micro_batches > 1 else "")


IN_ONE_PASS = [(*row, 1) for row in itertools.product(OPTIONS, POLICIES)]
ROWS = [
    pytest.param(*row, marks=marks(row), id=row_id(row))
    # An option's rows one after the other, so that they share its step.
    for row in sorted(IN_ONE_PASS + ACCUMULATED, key=lambda row: list(OPTIONS).index(row[0]))
]


def configure(
    option: str, policy: str, vram_budget: float | None, micro_batches: int = 1
) -> TrainConfig:
    """The function gives the option as it trains; in so many passes over the batch, but for
    "auto"."""
    config = replace(for_option(option), recompute=policy, vram_budget=vram_budget)
    if scale.SMOKE:
        model = replace(
            config.model,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            expert_intermediate_size=96,
            max_seq_len=32,
            vocab_size=OPTIONS["tiny"].model.vocab_size,
        )
        config = replace(config, model=model, batch_size=4, seq_len=32, device="cpu")
    if policy == "auto":
        return config
    return replace(config, micro_batch_size=config.batch_size // micro_batches)


def capacity_gib(vram_budget: float | None) -> float:
    """The function gives what a trainer may take: the budget, or what the card has less a
    reserve."""
    if vram_budget is not None:
        return vram_budget
    if steps.is_cpu():
        return float("inf")
    return torch.cuda.get_device_properties(0).total_memory / GIB - RESERVE_GIB


def needed_gib(config: TrainConfig) -> float:
    """The account that the planner uses says what is needed."""
    policies = memory.parse(config.recompute, config.model.num_layers)
    return memory.account(config, policies, config.micro_batch_size).total / GIB


class SharedStep:
    """The step of the option at hand and its data are built when a row first asks for them."""

    def __init__(self) -> None:
        self.option: str | None = None
        self.stack = contextlib.ExitStack()

    def of(self, config: TrainConfig) -> tuple[TrainStep, TrainLoader]:
        """The option's step takes this configuration's plan from now on."""
        if self.option != config.option:
            self.close()
            self.stack.enter_context(steps.clean_memory())
            self.opened = self.stack.enter_context(open_steps(config))
            self.option = config.option
        step = self.opened[0]
        step.follow(setup.plan_memory(config, step.compute, step.compute.budget_bytes))
        steps.free_memory()
        return self.opened

    def close(self) -> None:
        """The memory is given back."""
        self.option = self.opened = None
        self.stack.close()


@pytest.fixture(scope="module")
def shared_step():
    with contextlib.closing(SharedStep()) as shared:
        yield shared


def projection(config: TrainConfig, plan: MemoryPlan) -> dict[str, float]:
    """The function gives what `hamner.plan` says of this card; nothing where it does not know it,
    nor of the demo, whose kernels take less time than the least that any kernel takes."""
    gpu = None if steps.is_cpu() else identify(torch.cuda.get_device_name())
    if gpu is None or config.option == "tiny":
        return {}
    prediction = predict(config, gpu, plan.policies, plan.micro_batch_size)
    return {
        "projected_tokens_per_second": round(prediction.tokens_per_second),
        "projected_gib": round(prediction.peak_gib, 3),
    }


@pytest.mark.parametrize(("option", "policy", "micro_batches"), ROWS)
def test_option(benchmark, option, policy, micro_batches, vram_budget, does_not_fit, shared_step):
    benchmark.group = f"option {option}"
    if policy == "auto" and vram_budget is None and not steps.is_cpu():
        pytest.skip("where memory is plenty, auto is selective; it differs under --vram-budget")
    config = configure(option, policy, vram_budget, micro_batches)
    if scale.COMPILE_ONLY:
        config = few_layers(config)
    capacity = capacity_gib(vram_budget)
    row = row_id((option, policy, micro_batches)).replace("-", " ")
    if policy != "auto" and needed_gib(config) > capacity:
        does_not_fit(row, needed_gib(config), capacity)
    started = time.perf_counter()
    try:
        step, loader = shared_step.of(config)
        plan = step.plan
        benchmark.extra_info.update(
            kind="option",
            option=option,
            recompute=policy,
            policies=memory.describe(plan.policies),
            batch_size=config.batch_size,
            micro_batch_size=plan.micro_batch_size,
            attention=step.attention.name,
            planned_gib=round(plan.account.total / GIB, 3),
            **projection(config, plan),
        )
        steps.measure(benchmark, lambda: take(step, loader, 1), config, started=started)
    except (torch.OutOfMemoryError, UserError):
        # "auto" refuses a budget that is too small for a single sequence.
        shared_step.close()
        does_not_fit(row, None, capacity)
