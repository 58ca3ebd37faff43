"""What Muon costs: the update of option a beside other implementations, and whole steps by recipe.

    pytest bench/test_muon.py --benchmark-only

`test_update` times the whole update of every parameter, clipping included, after `AHEAD_MS` of
other work on the GPU, as an update comes after forward and backward: launches are queued by then,
as far as there are few enough. Before that the first update must have moved each logical matrix of
a layer by the orthogonal factor of its gradient, up to what the published iterations leave
(singular values 0.7 to 1.2). "hamner, AdamW" is the same optimizer with `--optimizer adamw`.

`test_step` times whole steps by `--recipe`, of 24 x 1,024 tokens in one pass and of 96 x 1,024 in
four: on one model, and with the qk-norm that `--recipe muon` has.
"""

import functools
import math
import statistics
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import scale, steps
from bench.compile_ahead import few_layers
from bench.muon_baselines import (
    CONTENDERS,
    LR,
    Contender,
    Hamner,
    Logical,
    gradient,
    logical_matrices,
)
from bench.test_options import configure
from bench.timing import elapsed
from hamner.config.recipe import RECIPES
from hamner.config.train import TrainConfig
from hamner.kernels.muon import RMS

pytestmark = pytest.mark.needs_gpu

ADAMW = "hamner, AdamW"
MAX_DISTANCE = 0.3
"""relative, Frobenius, from the orthogonal factor: what is transposed, not split or scaled
otherwise is more than 0.4 off"""
AHEAD_MS = 100.0
CYCLES = 50_000_000
"""of sleep, about 25 ms, of which a millisecond's are measured"""
WARM_UP_CALLS, ROUNDS = 3, 20
FIRST_LOSSES: dict[tuple[int, bool], float] = {}
"""by batch and qk-norm, of the row that comes first"""


def run_of(recipe: str) -> TrainConfig:
    """The function gives option a without qk-norm, with one pass over its batch, by a recipe."""
    config = replace(configure("a", "selective", None), recipe=recipe, **RECIPES[recipe])
    return few_layers(config) if scale.COMPILE_ONLY else config


@pytest.mark.parametrize(
    "implementation",
    (ADAMW, pytest.param("hamner", marks=pytest.mark.quick), *list(CONTENDERS)[1:]),
)
def test_update(benchmark, implementation):
    benchmark.group = "Muon's update of option a"
    with steps.clean_memory():
        if implementation == ADAMW:
            contender = Hamner(run_of("plan"))
        else:
            contender = CONTENDERS[implementation](run_of("muon"))
            check_first_update(contender, run_of("muon"))
        time_update(benchmark, contender, implementation)


def check_first_update(contender: Contender, config: TrainConfig) -> None:
    """The first update must be the orthogonal one of each logical matrix of the first layer."""
    matrices = matrices_of_a_layer(config)
    before = {matrix: contender.weight(matrix) for matrix in matrices}
    contender.update()
    for matrix, expected in matrices.items():
        moved = (1 - LR * config.weight_decay) * before[matrix] - contender.weight(matrix)
        moved /= LR * RMS * math.sqrt(max(moved.shape))
        distance = float((moved - expected).norm() / expected.norm())
        assert distance <= MAX_DISTANCE, f"not timed: {matrix} moved {distance:.2f} from U V^T"


@functools.cache
def matrices_of_a_layer(config: TrainConfig) -> dict[Logical, Tensor]:
    """The function gives U V^T of the gradient of each logical matrix of the first layer."""
    found = {}
    for name, parameter in Hamner(config).optimizer.parameters.items():
        if ".0." in name:
            whole = gradient(name, parameter)
            for matrix in logical_matrices(config, name, parameter):
                found[matrix] = orthogonal_factor(matrix.of(whole))
    return found


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """The function gives U V^T of U S V^T, by the eigenvalues of the smaller Gram matrix in
    fp64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    factor = (vectors / values.sqrt()) @ (vectors.mT @ wide)
    return (factor if factor.shape == matrix.shape else factor.mT).float()


def time_update(benchmark, contender: Contender, implementation: str) -> None:
    """The function times updates one by one into `extra_info`."""
    for _ in range(1 if scale.SMOKE or scale.COMPILE_ONLY else WARM_UP_CALLS):
        contender.update()
    if scale.COMPILE_ONLY:
        return
    steps.synchronize()
    before = 0 if scale.SMOKE else torch.cuda.memory_allocated()
    steps.reset_peak()
    milliseconds = [time_one(contender) for _ in range(scale.pick(ROUNDS, 2))]
    deciles = statistics.quantiles(milliseconds, n=10)
    benchmark.extra_info.update(
        kind="kernel",
        op=f"{'AdamW' if implementation == ADAMW else 'Muon'}'s update of option a",
        implementation=implementation.split(",")[0],
        timed=f"after {AHEAD_MS:.0f} ms of work",
        median_ms=round(statistics.median(milliseconds), 3),
        p10_ms=round(deciles[0], 3),
        p90_ms=round(deciles[-1], 3),
        peak_mib=None
        if scale.SMOKE
        else round((torch.cuda.max_memory_allocated() - before) / 2**20, 1),
    )
    benchmark.pedantic(contender.update, rounds=1)


def time_one(contender: Contender) -> float:
    """The function gives the milliseconds of one update on the GPU."""
    if scale.SMOKE:
        started = time.perf_counter()
        contender.update()
        return (time.perf_counter() - started) * 1e3
    torch.cuda._sleep(int(AHEAD_MS * cycles_a_millisecond()))
    return elapsed(contender.update)


@functools.cache
def cycles_a_millisecond() -> float:
    """The function measures the clock that `torch.cuda._sleep` counts."""
    return CYCLES / elapsed(lambda: torch.cuda._sleep(CYCLES))


@pytest.mark.parametrize(("recipe", "qk_norm"), (("plan", False), ("muon", False), ("muon", True)))
@pytest.mark.parametrize("passes", (1, 4))
def test_step(benchmark, passes, recipe, qk_norm):
    benchmark.group = "option a by --recipe"
    config = run_of(recipe)
    model = replace(config.model, qk_norm=qk_norm)
    config = replace(config, model=model, batch_size=passes * config.batch_size)
    added = " with qk-norm" if qk_norm else ""
    trainer = f"hamner --recipe {recipe}{added}, {config.batch_size} x {config.seq_len:,}"
    key = passes, qk_norm
    steps.measure_run(benchmark, config, trainer, first_losses=FIRST_LOSSES, key=key)
