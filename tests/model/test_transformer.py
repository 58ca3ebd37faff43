"""Tests hold the model's losses and gradients, and that targets are shifted only once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from hamner.data.batch import Batch
from hamner.model.transformer import Transformer
from hamner.plan.memory import FULL, NONE, SELECTIVE
from tests.models import DENSE, MOE, build, cpu_ops


@pytest.mark.parametrize("config", [DENSE, MOE, replace(MOE, num_shared_experts=1, num_experts=3)])
def test_loss_is_cross_entropy_of_the_logits(config):
    model = build(config)
    inputs = torch.randint(config.vocab_size, (2, 16))
    targets = torch.randint(config.vocab_size, (2, 16))
    targets[0, 3:7] = -100
    output = model(inputs, targets)
    expected = functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.cross_entropy, expected)
    if config.is_moe:
        assert output.loss > output.cross_entropy
        assert output.router.load.shape == (config.num_layers, config.num_experts)
        torch.testing.assert_close(output.router.load.sum(-1), torch.ones(config.num_layers))
    else:
        torch.testing.assert_close(output.loss, output.cross_entropy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("config", [DENSE, MOE, replace(MOE, num_shared_experts=1, num_experts=3)])
def test_no_block_returns_a_view(config, kernels):
    """FSDP2 warns its users of one, who can do nothing about it."""
    model = Transformer(config, cpu_ops(kernels, "sdpa"))
    model.initialize(seed=0)
    returned = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, output: returned.extend(output[:2]))
    tokens = torch.randint(config.vocab_size, (2, 16))
    model(tokens, tokens)
    assert len(returned) == 2 * config.num_layers
    assert not [output for output in returned if output._is_view()]


def predictable_batch(rows: int, length: int, shift: int) -> Batch:
    """In a Markov chain the next token is one of two, but two ahead any of four.

    `shift` is 1 for the pipeline's targets; anything else is a mistake.
    """
    generator = np.random.default_rng(0)
    tokens = np.zeros((rows, length + 2), dtype=np.int64)
    tokens[:, 0] = generator.integers(16, size=rows)
    for position in range(length + 1):
        coin = generator.integers(2, size=rows)
        # A de Bruijn walk on 16 states: each has exactly two successors.
        tokens[:, position + 1] = (2 * tokens[:, position] + coin) % 16
    sequence = torch.from_numpy(tokens)
    return Batch(
        inputs=sequence[:, :length],
        targets=sequence[:, shift : shift + length],
        document_ids=torch.zeros((rows, length), dtype=torch.int32),
    )


def train_on(batch: Batch, steps: int = 60) -> float:
    config = replace(DENSE, vocab_size=16)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(batch.inputs, batch.targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_targets_are_shifted_once():
    """One step ahead costs ln 2, two steps ahead ln 4: a model that shifts again cannot pass."""
    one_ahead = train_on(predictable_batch(rows=64, length=32, shift=1))
    two_ahead = train_on(predictable_batch(rows=64, length=32, shift=2))
    assert 0.6 < one_ahead < 0.8
    assert two_ahead > 1.2


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        replace(MOE, num_shared_experts=1),
        replace(DENSE, use_differential_attention=True),
        replace(DENSE, qk_norm=True),
    ],
)
@pytest.mark.parametrize("policy", [SELECTIVE, FULL])
@pytest.mark.parametrize("documents", [False, True])
def test_recompute_policies_give_the_same_gradients(config, policy, documents):
    inputs = torch.randint(config.vocab_size, (2, 16))
    targets = torch.randint(config.vocab_size, (2, 16))
    ids = torch.arange(16, dtype=torch.int32).expand(2, 16) // 5 if documents else None
    gradients = []
    for policies in ((NONE, NONE), (policy, NONE), (policy, policy)):
        model = build(config, policies=policies)
        model(inputs, targets, ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient is not None, name
            assert torch.equal(gradient, other[name]), name


def test_documents_do_not_see_their_neighbours():
    model = build(DENSE)
    generator = torch.Generator().manual_seed(2)
    first, second, other = (torch.randint(128, (1, 20), generator=generator) for _ in range(3))
    ids = (torch.arange(40, dtype=torch.int32) >= 20).int()[None]
    packed = model(torch.cat((first, second), 1), document_ids=ids).logits
    with_other = model(torch.cat((other, second), 1), document_ids=ids).logits
    by_itself = model(second).logits
    assert torch.equal(packed[:, 20:], with_other[:, 20:])
    torch.testing.assert_close(packed[:, 20:], by_itself, rtol=0, atol=1e-5)
    unmasked = model(torch.cat((first, second), 1)).logits
    assert (unmasked[:, 20:] - by_itself).abs().max() > 1e-3


def test_later_tokens_do_not_change_earlier_logits():
    model = build(DENSE)
    inputs = torch.randint(128, (1, 24))
    changed = inputs.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 128
    torch.testing.assert_close(
        model(inputs).logits[:, :12], model(changed).logits[:, :12], rtol=0, atol=1e-6
    )


def test_initial_weights():
    model = build(replace(DENSE, hidden_size=256, num_attention_heads=4))
    assert abs(model.embed.weight.std().item() - 0.02) < 5e-4
    assert torch.equal(model.norm.weight, torch.ones(256))
    again = build(model.config)
    assert torch.equal(model.embed.weight, again.embed.weight)
    assert not torch.equal(model.embed.weight, build(model.config, seed=1).embed.weight)
