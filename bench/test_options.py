"""Every option under every recompute policy: tokens/s against memory, on this card.

    pytest bench/test_options.py --benchmark-only [--vram-budget 24]

Real data through the real loader, the whole batch in one pass; "auto" is what `hamner.train` would
choose within the budget. What does not fit is reported with what it needs. `extra_info` holds
tokens/s (of the median step), MFU, the step's 10th, 50th and 90th percentile, the peak allocated
and reserved, and apart from them the seconds to build and to warm up, compilation included.
"""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from bench import scale, steps
from hamner import recompute
from hamner.config import TrainConfig
from hamner.errors import UserError
from hamner.options import OPTIONS
from hamner.profiling.steps import Steps
from hamner.recompute import GIB, RESERVE_GIB

POLICIES = ("auto", "none", "selective", "full")
QUICK = {("a", "selective"), ("a", "full"), ("c", "selective"), ("tiny", "auto")}
ON_CPU_TOO = {("tiny", "auto")}


def marks(row: tuple[str, str]) -> list[pytest.MarkDecorator]:
    """Those of a row."""
    quick = [pytest.mark.quick] if row in QUICK else []
    return quick if row in ON_CPU_TOO else [*quick, pytest.mark.needs_gpu]


ROWS = [pytest.param(*row, marks=marks(row)) for row in itertools.product(OPTIONS, POLICIES)]


def configure(option: str, policy: str, vram_budget: float | None) -> TrainConfig:
    """The option as it trains; in one pass over the batch, but for "auto"."""
    config = replace(TrainConfig.for_option(option), recompute=policy, vram_budget=vram_budget)
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
    return config if policy == "auto" else replace(config, micro_batch_size=config.batch_size)


def capacity_gib(vram_budget: float | None) -> float:
    """What a trainer may take: the budget, or what the card has less a reserve."""
    if vram_budget is not None:
        return vram_budget
    if steps.is_cpu():
        return float("inf")
    return torch.cuda.get_device_properties(0).total_memory / GIB - RESERVE_GIB


def needed_gib(config: TrainConfig) -> float:
    """By the account that the planner uses."""
    account = recompute.account(
        config.model,
        recompute.parse(config.recompute, config.model.num_layers),
        micro_batch_tokens=config.tokens_per_step,
        precision="bf16",
        accumulate=False,
        fused=True,
    )
    return account.total / GIB


@pytest.mark.parametrize(("option", "policy"), ROWS)
def test_option(benchmark, option, policy, vram_budget, does_not_fit):
    benchmark.group = f"option {option}"
    if policy == "auto" and vram_budget is None and not steps.is_cpu():
        pytest.skip("where memory is plenty, auto is selective; it differs under --vram-budget")
    config = configure(option, policy, vram_budget)
    capacity = capacity_gib(vram_budget)
    row = f"{option} {policy}"
    if policy != "auto" and needed_gib(config) > capacity:
        does_not_fit(row, needed_gib(config), capacity)
    started = time.perf_counter()
    try:
        with steps.clean_memory(), Steps(config) as run:
            plan = run.trainer.plan
            benchmark.extra_info.update(
                kind="option",
                option=option,
                recompute=policy,
                policies=recompute.describe(plan.policies),
                micro_batch_size=plan.micro_batch_size,
                attention=run.trainer.attention.name,
                planned_gib=round(plan.account.total / GIB, 3),
            )
            steps.measure(
                benchmark,
                lambda: run.take(1),
                model=config.model,
                seq_len=config.seq_len,
                tokens_per_step=config.tokens_per_step,
                started=started,
            )
    except (torch.OutOfMemoryError, UserError):
        # "auto" refuses a budget that is too small for a single sequence.
        does_not_fit(row, None, capacity)
