"""Several processes give the losses of one, whatever the engine and the number of processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.model import ModelConfig
from hamner.config.sft import SftConfig
from hamner.config.train import ComputeConfig, TrainConfig
from hamner.export.__main__ import ExportConfig, export
from hamner.sft.fine_tuning import fine_tune
from hamner.train.loop import train
from tests.parallel.jobs import enter, run_job, said, train_together
from tests.train.test_loop import metrics, small_config

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.timeout(300)]

STEPS = 20
MIXTURE = {"num_experts": 4, "num_experts_per_token": 2}
CASES = [
    ("dense", {}),
    ("differential", {"use_differential_attention": True}),
    ("qk-norm", {"qk_norm": True}),
    ("mixture", MIXTURE),
    ("balanced", {**MIXTURE, "num_shared_experts": 1, "router_balance": "bias"}),
    ("muon", MIXTURE),
]
MICRO_BATCHES = {
    4: ["qk-norm", "differential", "mixture", "muon"],
    2: ["dense", "balanced"],
}
"""by size, of steps of 8 rows: two processes only accumulate those of 2"""


def variant(config: TrainConfig, name: str, **changes) -> TrainConfig:
    return replace(config, run_dir=config.run_dir.with_name(name), **changes)


def assert_same_losses(one: Path, several: Path) -> None:
    """Losses agree to rounding: the same micro-batches' gradients are added in another order."""
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
    samples = [(run / "samples.jsonl") for run in (one, several)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text()


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
def single(config) -> dict[tuple[str, int], TrainConfig]:
    """The fixture has the runs of one process, by case and micro-batch."""
    shapes: dict[str, ModelConfig] = {n: replace(config.model, **c) for n, c in CASES}
    runs = {
        (name, size): variant(
            config,
            f"one_{name}_{size}",
            model=shapes[name],
            micro_batch_size=size,
            optimizer="muon" if name == "muon" else "adamw",
            sample_every=STEPS if name == "balanced" else 0,
        )
        for size, names in MICRO_BATCHES.items()
        for name in names
    }
    for run in runs.values():
        train(run)
    return runs


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one(engine, config, single, tmp_path):
    runs = {
        key: variant(run, run.run_dir.name.replace("one", engine), parallel=engine)
        for key, run in single.items()
    }
    train_together(list(runs.values()), 2, tmp_path)
    for key, run in runs.items():
        assert_same_losses(single[key].run_dir, run.run_dir)
    # Torch has no warning for its user.
    assert "Warning" not in said(tmp_path, 2)


def test_four_processes_on_two_machines_train_as_one(config, single, tmp_path):
    """One job shards in a hybrid way, each machine having the whole model; one uses DDP."""
    fsdp, ddp = (
        variant(
            single["balanced", 2],
            f"four_{engine}",
            parallel=engine,
            recompute="full:1",
            fsdp_reshard=False,
        )
        for engine in ("fsdp", "ddp")
    )
    # Two micro-batches each: gradients cross between machines once a step.
    finer = variant(single["dense", 2], "four_fine", parallel="fsdp", micro_batch_size=1)
    train_together([fsdp, ddp, finer], 4, tmp_path, machines=2)
    for run in (fsdp, ddp):
        assert_same_losses(single["balanced", 2].run_dir, run.run_dir)
    assert_same_losses(single["dense", 2].run_dir, finer.run_dir)


def test_a_run_moves_between_numbers_of_processes(config, single, tmp_path):
    """It goes 1 -> 2 -> 4 -> 1, sharded and not, with the batches and losses of one that stayed."""
    # The statistics of a mixture's routers are those of a micro-batch, so its size stays.
    stayed = variant(single["mixture", 4], "stayed", micro_batch_size=2, save_every=5, keep=0)
    moved = variant(stayed, "moved", stop_after=5, save_every=2, keep=2)
    train(stayed)
    train(moved)
    resumed = replace(moved, resume=True)
    tuned = replace(
        SftConfig.for_checkpoint(moved.run_dir),
        data=(str(write_conversations(tmp_path / "echo.jsonl")),),
        run_dir=tmp_path / "tuned",
        steps=4,
        batch_size=4,
        eval_every=2,
        compute=ComputeConfig(parallel="fsdp", device="cpu"),
    )
    codes = run_job(train_and_tune, 2, tmp_path / "two", replace(resumed, parallel="fsdp"), tuned)
    assert codes == [0, 0], said(tmp_path / "two", 2)
    assert_same_state(last_checkpoint(moved), stayed.run_dir / "checkpoints" / "step_00000010")
    assert find_saved_model(tuned.run_dir).is_chat
    exported = export(ExportConfig(tmp_path / "exported", "hf", checkpoint=tuned.run_dir))
    assert (exported / "model.safetensors").is_file()
    train_together([replace(resumed, parallel="fsdp")], 4, tmp_path / "four", machines=2)
    train(replace(resumed, stop_after=None))
    assert_same_losses(stayed.run_dir, moved.run_dir)
    assert_same_state(last_checkpoint(moved), last_checkpoint(stayed))


def train_and_tune(ports: list[int], config: TrainConfig, tuned: SftConfig) -> None:
    """The function is the body of a process; fine-tuning begins with what training saved."""
    enter(ports)
    train(config)
    enter(ports)
    fine_tune(tuned)


def write_conversations(path: Path) -> Path:
    with path.open("w") as file:
        for number in range(40):
            turns = [("user", "abcdefgh"[number % 8]), ("assistant", "yes")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def last_checkpoint(config: TrainConfig) -> Path:
    return checkpoint.find(config.run_dir / "checkpoints")[-1].path


def assert_same_state(one: Path, other: Path) -> None:
    """Weights and moments agree to rounding, the data position exactly."""
    assert one.name == other.name
    checkpoint.Checkpoint(one, 0).verify()
    for file in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE):
        found, expected = load_file(one / file), load_file(other / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5, msg=name)
    states = [json.loads((path / checkpoint.STATE_FILE).read_text()) for path in (one, other)]
    for name in ("data", "tokens", "optimizer_steps", "schedule"):
        assert states[0][name] == states[1][name]
