"""Routers kept even by biases: in the step, across checkpoints, and in the saved model."""

from dataclasses import replace

import pytest
import torch

from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.model import ModelConfig
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.export.__main__ import ExportConfig, export
from hamner.train.loop import TrainingLoop, train
from tests.models import MOE, build
from tests.saved import save_run
from tests.train.test_loop import (
    assert_equal_weights,
    metrics,
    small_config,
    weights,
)

BIASED = replace(MOE, router_balance="bias")
GOOD, BAD = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A minute mixture that is balanced by biases."""
    config = small_config(tmp_path)
    model = replace(
        config.model,
        expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_token=2,
        router_balance="bias",
        router_bias_update_speed=0.01,
    )
    return replace(config, model=model)


def biases(model) -> torch.Tensor:
    """(layers, experts)."""
    return torch.stack([layer.mlp.router_bias for layer in model.layers])


def test_biases_move_against_the_load():
    model = build(replace(BIASED, router_bias_update_speed=0.5))
    load = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    model.balance_routers(load, GOOD)
    assert biases(model).tolist() == [[-0.5, 0.0, 0.5, 0.5], [0.0] * 4]
    model.balance_routers(load.flip(1), GOOD)
    assert biases(model).tolist() == [[0.0, 0.5, 0.5, 0.0], [0.0] * 4]


def test_a_skipped_step_moves_no_bias():
    model = build(BIASED)
    model.balance_routers(torch.full((2, 4), float("nan")), BAD)
    assert not biases(model).any()


def test_bias_chooses_the_experts_and_has_no_loss_and_no_gradient():
    tokens = torch.randint(BIASED.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    model = build(replace(BIASED, router_z_loss_coef=0.0))
    for layer in model.layers:
        layer.mlp.router_bias[1] = 2.0
    output = model(tokens[:, :-1], tokens[:, 1:])
    assert (output.router.load[:, 1] == 0.5).all()
    assert torch.equal(output.loss, output.cross_entropy)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert biases(model).sum() == 4.0


def skew(trainer: TrainingLoop) -> None:
    """Make every router like expert 0 and shun expert 3, whatever the token."""
    with torch.no_grad():
        trainer.step.model.embed.weight.add_(0.1)  # so all tokens have one direction in common
        for layer in trainer.step.model.layers:
            layer.mlp.router.weight[0].add_(0.02)
            layer.mlp.router.weight[3].sub_(0.05)


def train_skewed(config: TrainConfig) -> list[dict]:
    """Records of a run that learns next to nothing: only biases can even out its routers."""
    config = replace(
        config, lr=1e-9, min_lr=1e-9, weight_decay=0.0, log_every=10, eval_every=0, steps=80
    )
    trainer = TrainingLoop(config)
    skew(trainer)
    trainer.run_to_end()
    trainer.close()
    return metrics(config.run_dir)


def most(record: dict) -> float:
    return max(share for layer in record["router"]["load"] for share in layer)


def least(record: dict) -> float:
    return min(share for layer in record["router"]["load"] for share in layer)


def test_biases_even_out_a_skewed_router_and_nothing_else_does(config, tmp_path):
    balanced = train_skewed(config)
    by_loss = replace(config.model, router_balance="aux")
    skewed = train_skewed(replace(config, model=by_loss, run_dir=tmp_path / "aux"))
    assert most(skewed[-1]) > 0.45
    assert least(skewed[-1]) < 0.02
    assert most(balanced[-1]) < 0.35
    assert least(balanced[-1]) > 0.15
    assert all(record["router"]["dropped"] == [0.0, 0.0] for record in balanced + skewed)


@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_a_starved_expert_is_reported_once(config, balance, monkeypatch, capsys):
    monkeypatch.setattr("hamner.train.health.StarvationDetector.STEPS", 20)
    model = replace(config.model, router_balance=balance, router_bias_update_speed=1e-6)
    train_skewed(replace(config, model=model))
    said = [line for line in capsys.readouterr().out.splitlines() if "of its fair share" in line]
    for layer in (0, 1):
        assert sum(f"WARNING: layer {layer}: expert 3 gets " in line for line in said) == 1
    assert not any("expert 0 gets" in line for line in said)
    assert all(("--router-bias-update-speed" in line) == (balance == "bias") for line in said)


def test_the_load_of_all_micro_batches_counts(config, tmp_path):
    loads, steps = [], []
    for size in (8, 2):
        run_dir = tmp_path / f"micro_{size}"
        trainer = TrainingLoop(replace(config, micro_batch_size=size, run_dir=run_dir))
        try:
            skew(trainer)
            trainer.step.step(next(trainer.data.loader), 1e-3)
            loads.append(trainer.step.router_sum[:, :-1].clone())
            steps.append(biases(trainer.step.model).clone())
        finally:
            trainer.close()
    torch.testing.assert_close(*loads, rtol=0, atol=1e-6)
    assert torch.equal(*steps)
    assert steps[0].any()


def test_resume_is_exact(config):
    """Also the load of a log interval that a stop cuts in two: 7 is between 6 and 9."""
    whole = train(config)
    halves = replace(config, run_dir=config.run_dir.with_name("halves"))
    train(replace(halves, stop_after=7))
    resumed = train(replace(halves, resume=True))
    assert_equal_weights(whole, resumed)
    saved = weights(resumed)["model.safetensors/layers.0.mlp.router_bias"]
    assert saved.dtype == torch.float32
    assert saved.any()
    assert metrics(config.run_dir) == metrics(halves.run_dir)


@pytest.mark.parametrize(
    "damage",
    [
        {"router_sum": 1.0},
        {"router_sum": [[0.5] * 4] * 2},
        {"starvation": None},
        {"starvation": {"low_steps": [["0"] * 4] * 2, "told": [[False] * 4] * 2}},
    ],
)
def test_damaged_state_of_the_routers_is_refused(config, damage, monkeypatch):
    train(replace(config, stop_after=1))
    state = Checkpoint.state
    monkeypatch.setattr(Checkpoint, "state", lambda self: state(self) | damage)
    with pytest.raises(UserError, match=f"{next(iter(damage))}.* is not what it must be"):
        train(replace(config, resume=True))


def test_a_mixture_saved_before_its_routers_had_state_resumes(config, monkeypatch):
    train(replace(config, stop_after=1))
    state = Checkpoint.state

    def older(self) -> dict:
        values = state(self)
        return {k: v for k, v in values.items() if k not in ("router_sum", "starvation")}

    monkeypatch.setattr(Checkpoint, "state", older)
    assert train(replace(config, resume=True, stop_after=1)).step == 2


def test_recompute_sees_the_biases_of_the_forward_pass(config):
    results = [
        train(replace(config, steps=6, recompute=policy, run_dir=config.run_dir / policy))
        for policy in ("none", "full:1")
    ]
    assert_equal_weights(*results)


def test_the_balance_is_part_of_the_model_and_its_speed_is_not(config):
    train(replace(config, stop_after=1))
    faster = replace(config.model, router_bias_update_speed=0.1)
    assert train(replace(config, model=faster, resume=True, stop_after=1)).step == 2
    by_loss = replace(config.model, router_balance="aux")
    with pytest.raises(UserError, match="--router-balance aux is not the bias"):
        train(replace(config, model=by_loss, resume=True))


def test_a_saved_model_uses_its_biases(tmp_path):
    model = build(replace(BIASED, vocab_size=600))
    inputs = torch.randint(600, (1, 16), generator=torch.Generator().manual_seed(1))
    without = model(inputs).logits
    for layer in model.layers:
        layer.mlp.router_bias[2] = 1.0
    saved = find_saved_model(save_run(tmp_path / "run", model))
    loaded = saved.build(torch.device("cpu"))
    logits = loaded(inputs).logits
    assert torch.equal(logits, model(inputs).logits)
    assert not torch.allclose(logits, without)


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_export_is_refused_because_mixtral_has_no_biases(to, tmp_path):
    run = save_run(tmp_path / "run", build(replace(BIASED, vocab_size=600)))
    with pytest.raises(UserError, match="no place for the router biases"):
        export(ExportConfig(tmp_path / "out", to, run))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router_balance": "bias"}, "--router-balance bias needs --num-experts above 0"),
        ({"router_bias_update_speed": 0.0}, "--router-bias-update-speed must be above 0"),
    ],
)
def test_flags_that_make_no_sense_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(**changes)
