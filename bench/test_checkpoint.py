"""A checkpoint of option tiny is saved and loaded, on whatever machine there is.

    pytest bench/test_checkpoint.py --benchmark-only

`extra_info.mb_per_s` counts model and optimizer, 10^6 bytes; saving includes the checksums and the
flush to disk, loading the verification.
"""

import itertools

import pytest

from bench.test_options import configure
from hamner.checkpoint import format as checkpoint
from hamner.train.optimizer import join_masters
from hamner.train.step import TrainStep

ROUNDS = 5


@pytest.fixture
def optimizer():
    return TrainStep(configure("tiny", "auto", None)).optimizer


def save(optimizer, folder, step: int) -> checkpoint.Checkpoint:
    return checkpoint.save(
        folder,
        step,
        model=optimizer.parameters,
        optimizer=join_masters(optimizer.parameters, optimizer.state_tensors()),
        state={"step": step},
    )


def record(benchmark, optimizer, direction: str) -> None:
    tensors = [*optimizer.parameters.values(), *optimizer.state_tensors().values()]
    size = sum(tensor.nbytes for tensor in tensors)
    benchmark.extra_info.update(
        kind="checkpoint",
        direction=direction,
        mb_per_s=round(size / benchmark.stats.stats.median / 1e6),
    )


def test_save(benchmark, optimizer, tmp_path):
    numbers = itertools.count(1)
    benchmark.pedantic(lambda: save(optimizer, tmp_path, next(numbers)), rounds=ROUNDS)
    record(benchmark, optimizer, "save")


def test_load(benchmark, optimizer, tmp_path):
    saved = save(optimizer, tmp_path, 1)

    def load() -> None:
        saved.verify()
        optimizer.restore(saved)

    benchmark.pedantic(load, rounds=ROUNDS)
    record(benchmark, optimizer, "load")
