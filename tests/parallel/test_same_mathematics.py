"""Several processes give the losses of one, whatever the engine and the number of processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hamner import checkpoint
from hamner.config import TrainConfig
from hamner.options import ModelConfig
from hamner.trainer import train
from tests.parallel.jobs import train_together
from tests.test_trainer import metrics, small_config, weights

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.timeout(300)]

STEPS = 20
MIXTURE = {"num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1}
CASES = [
    ("dense", {}),
    ("differential", {"use_differential_attention": True}),
    ("mixture", MIXTURE),
    ("balanced", {**MIXTURE, "router_balance": "bias"}),
]
MICRO_BATCHES = {4: ["dense", "differential", "mixture"], 2: ["dense", "differential", "balanced"]}
"""by size, of steps of 8 rows: two processes accumulate those of 2 alone"""


def variant(config: TrainConfig, name: str, **changes) -> TrainConfig:
    return replace(config, run_dir=config.run_dir.with_name(name), **changes)


def assert_same_losses(one: Path, several: Path) -> None:
    """To rounding: the same micro-batches, whose gradients are added in another order."""
    first, second = metrics(one), metrics(several)
    assert [r["step"] for r in first] == [r["step"] for r in second] == list(range(1, STEPS + 1))
    for expected, found in zip(first, second, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            if expected[name] is None:
                assert found[name] is None
            else:
                assert found[name] == pytest.approx(expected[name], rel=1e-6), (name, found)
        assert found["tokens"] == expected["tokens"]
        assert found["sources"] == expected["sources"]
        if "router" in expected:
            assert found["router"]["dropped"] == expected["router"]["dropped"]
            for part in ("load", "entropy"):
                assert flat(found["router"][part]) == pytest.approx(
                    flat(expected["router"][part]), abs=1e-5
                )


def flat(values: list) -> list[float]:
    return [x for value in values for x in (flat(value) if isinstance(value, list) else [value])]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    return replace(
        small_config(tmp_path_factory.mktemp("runs")),
        lr=1e-3,
        log_every=1,
        eval_every=10,
        eval_tokens=5 * 64,  # rows that two or four processes cannot share evenly
    )


@pytest.fixture(scope="module")
def alone(config) -> dict[tuple[str, int], TrainConfig]:
    """The runs of one process, by case and micro-batch."""
    shapes: dict[str, ModelConfig] = {n: replace(config.model, **c) for n, c in CASES}
    runs = {
        (name, size): variant(
            config, f"one_{name}_{size}", model=shapes[name], micro_batch_size=size
        )
        for size, names in MICRO_BATCHES.items()
        for name in names
    }
    for run in runs.values():
        train(run)
    return runs


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one(engine, config, alone, tmp_path):
    runs = {
        key: variant(run, run.run_dir.name.replace("one", engine), parallel=engine)
        for key, run in alone.items()
    }
    train_together(list(runs.values()), 2, tmp_path)
    for key, run in runs.items():
        assert_same_losses(alone[key].run_dir, run.run_dir)


def test_four_processes_on_two_machines_train_as_one(config, alone, tmp_path):
    """Hybrid sharding, where each machine has the whole model; and DDP."""
    fsdp, ddp = (
        variant(
            alone["balanced", 2],
            f"four_{engine}",
            parallel=engine,
            recompute="full:1",
            fsdp_reshard=False,
        )
        for engine in ("fsdp", "ddp")
    )
    # Two micro-batches each: gradients cross between machines once a step.
    finer = variant(alone["dense", 2], "four_fine", parallel="fsdp", micro_batch_size=1)
    train_together([fsdp, ddp, finer], 4, tmp_path, machines=2)
    for run in (fsdp, ddp):
        assert_same_losses(alone["balanced", 2].run_dir, run.run_dir)
    assert_same_losses(alone["dense", 2].run_dir, finer.run_dir)


def test_a_run_moves_between_numbers_of_processes(config, alone, tmp_path):
    """1 -> 2 -> 4 -> 1, sharded and not, with the batches and losses of a run that stayed."""
    whole = alone["mixture", 4]
    moved = variant(whole, "moved", micro_batch_size=2, stop_after=5, save_every=2)
    resumed = replace(moved, resume=True)
    # Statistics of a mixture's routers are those of a micro-batch, so that stays 2.
    reference = variant(whole, "stayed", micro_batch_size=2)
    train(reference)
    train(moved)
    train_together([replace(resumed, parallel="fsdp")], 2, tmp_path / "two")
    saved = checkpoint.find(moved.run_dir / "checkpoints")[-1]
    saved.verify()
    assert saved.step == 10
    assert set(weights_of(saved.path)) == set(weights_of(one_checkpoint(reference)))
    train_together([replace(resumed, parallel="fsdp")], 4, tmp_path / "four", machines=2)
    last = train(replace(resumed, stop_after=None))
    assert last.step == STEPS
    assert_same_losses(reference.run_dir, moved.run_dir)
    stayed = weights_of(one_checkpoint(reference))
    for name, tensor in weights_of(last.checkpoint).items():
        assert tensor.shape == stayed[name].shape
    states = [
        json.loads((path / checkpoint.STATE_FILE).read_text())
        for path in (last.checkpoint, one_checkpoint(reference))
    ]
    assert states[0]["data"] == states[1]["data"]


def weights_of(path: Path) -> dict:
    class Result:
        checkpoint = path

    return weights(Result)


def one_checkpoint(config: TrainConfig) -> Path:
    return checkpoint.find(config.run_dir / "checkpoints")[-1].path
