"""The trainers of the comparison agree with each other, and what disagrees is found."""

from dataclasses import replace

import pytest
import torch

from bench import baselines, scale
from bench.baselines import Hamner, HuggingFace, Plain, Reference
from hamner.config.options import for_option
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from tests.models import DENSE, MOE

ROUNDING = 1e-5  # fp32, other orders of summation


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(scale, "SMOKE", True)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(DENSE.vocab_size, (4, 33), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Batch(inputs, targets, torch.zeros_like(inputs, dtype=torch.int32))


def run_config(tmp_path, **values) -> TrainConfig:
    config = for_option("tiny")
    # The loader's tokenizer has to fit the model; the batch compared does not come from it.
    model = replace(DENSE, vocab_size=config.model.vocab_size)
    sizes = {"batch_size": 4, "seq_len": 32, "device": "cpu"}
    return replace(config, model=model, **sizes, **values)


@pytest.mark.parametrize("memory_budget", [None, 0.5])
def test_plain_agrees(batch, memory_budget):
    contender = Plain(DENSE, memory_budget)
    try:
        assert Reference(DENSE, batch).error_of(contender) < ROUNDING
        before = [p.clone() for p in contender.model.parameters()]
        contender.step(batch)
        changed = zip(before, contender.model.parameters(), strict=True)
        assert all(not torch.equal(old, new) for old, new in changed)
    finally:
        contender.close()
    assert baselines.functorch_config.activation_memory_budget == 1.0


def test_the_chunked_loss_is_the_same(batch, monkeypatch):
    monkeypatch.setattr(baselines, "LOSS_CHUNK", 48)
    contender = Plain(DENSE, 1.0)
    assert Reference(DENSE, batch).error_of(contender) < ROUNDING
    contender.close()


def test_hugging_face_agrees(batch):
    assert Reference(DENSE, batch).error_of(HuggingFace(DENSE)) < ROUNDING


def test_mixtral_agrees_but_for_the_balance_of_experts(batch):
    config = replace(MOE, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    assert Reference(config, batch).error_of(HuggingFace(config)) < ROUNDING


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_hamner_agrees(batch, tmp_path, micro_batch_size):
    config = run_config(tmp_path, micro_batch_size=micro_batch_size)
    contender = Hamner(config)
    try:
        before = [p.clone() for p in contender.parameters()]
        assert Reference(config.model, batch).error_of(contender) < ROUNDING
        after = contender.parameters()
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    finally:
        contender.close()


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 100.0}, {"rms_norm_eps": 0.1}, {"num_layers": 1}]
)
def test_another_model_is_found_out(batch, changes, monkeypatch):
    """Each would be as fast or faster, and none may be timed."""
    # Scores grow with the width's root: at 64 this is what the default is at 1,024.
    monkeypatch.setattr(baselines, "SHARPENING", 4 * baselines.SHARPENING)
    other = Plain(replace(DENSE, **changes))
    assert Reference(DENSE, batch).error_of(other) > 0.1
    other.close()


def test_shifted_targets_are_found_out(batch):
    class ShiftsAgain(Plain):
        def backward(self, batch: Batch):
            return super().backward(replace(batch, targets=batch.targets.roll(-1, dims=1)))

    contender = ShiftsAgain(DENSE)
    assert Reference(DENSE, batch).error_of(contender) > 0.1
    contender.close()


def test_what_rounding_explains_is_allowed_and_no_more(batch, monkeypatch):
    """Plain models round at other places, and send some tokens to other experts."""
    monkeypatch.setattr(scale, "dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(baselines, "SHARPENING", 4 * baselines.SHARPENING)
    config = replace(MOE, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    reference = Reference(config, batch)
    assert 0.005 < reference.max_error < 0.5

    def error_of(config):
        contender = HuggingFace(config)
        contender.model.to(torch.bfloat16)
        return reference.error_of(contender)

    assert 0.005 < error_of(config) < reference.max_error
    assert error_of(replace(config, rope_theta=100.0)) > reference.max_error
    assert error_of(replace(config, rms_norm_eps=0.1)) > reference.max_error
