"""Whole steps of option a stand beside each other by `--matmul`: tokens/s and memory, on this card.

    pytest bench/test_int8_steps.py --benchmark-only

Real data through the real loader, the whole batch in one pass. All start from the same weights and
batch; a row whose first loss is not bf16's, as far as int8 allows, is not timed.
"""

from dataclasses import replace
from typing import get_args

import pytest

from bench import scale, steps
from bench.compile_ahead import few_layers
from bench.test_options import configure
from hamner.config.train import Matmul

pytestmark = pytest.mark.needs_gpu

MAX_LOSS_ERROR = 0.01
"""nats; quantisation is unbiased enough to cancel in the mean over 24,576 tokens"""
FIRST_LOSSES: dict[str, float] = {}
"""by policy, of bf16, whose row comes first"""


@pytest.mark.parametrize("matmul", get_args(Matmul))
@pytest.mark.parametrize("policy", ("selective", "none"))
def test_step(benchmark, policy, matmul, vram_budget):
    if scale.SMOKE and matmul != "bf16":
        pytest.skip("--matmul int8 needs a GPU")
    benchmark.group = "option a by --matmul"
    config = replace(configure("a", policy, vram_budget), matmul=matmul)
    if scale.COMPILE_ONLY:
        config = few_layers(config)
    steps.measure_run(
        benchmark,
        config,
        f"hamner --matmul {matmul}, {policy}",
        first_losses=FIRST_LOSSES,
        key=policy,
        max_error=MAX_LOSS_ERROR,
    )
