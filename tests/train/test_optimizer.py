"""AdamW with masters against torch's, the schedule, and accumulation."""

import math
from dataclasses import replace

import pytest
import torch

from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.writer import BackgroundSaver
from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.kernels.adamw import split_master
from hamner.train.optimizer import Optimizer, join_masters, logical_rows, muon_groups
from hamner.train.schedule import Schedule
from tests.models import DENSE, MOE, build, cpu_ops, plain_ops

BY_TOKENS = TrainConfig(model=DENSE, batch_size=1, seq_len=1, lr=1.0, min_lr=0.1)
"""a step is a token"""


def test_schedule_warms_up_then_follows_a_cosine():
    schedule = Schedule(replace(BY_TOKENS, warmup_steps=100, steps=1100))
    assert schedule(50) == 0.5
    assert schedule(100) == 1.0
    assert math.isclose(schedule(600), 0.55)
    assert math.isclose(schedule(1100), 0.1)
    assert math.isclose(schedule(5000), 0.1)


def test_other_decays_are_linear():
    linear = Schedule(replace(BY_TOKENS, warmup_steps=100, steps=1100, decay="linear"))
    assert math.isclose(linear(100), 1.0)
    assert math.isclose(linear(600), 0.55)
    assert math.isclose(linear(1100), 0.1)
    wsd = replace(BY_TOKENS, warmup_steps=100, steps=1100, decay="wsd", decay_fraction=0.5)
    assert Schedule(wsd)(50) == 0.5
    assert Schedule(wsd)(100) == Schedule(wsd)(550) == 1.0
    assert math.isclose(Schedule(wsd)(825), 0.55)
    assert math.isclose(Schedule(wsd)(1100), 0.1)
    # A fall as long as the run begins where the warm-up ends.
    assert math.isclose(Schedule(replace(wsd, decay_fraction=1.0))(600), 0.55)


def test_schedule_without_warmup_starts_at_the_peak():
    assert Schedule(replace(BY_TOKENS, warmup_steps=0, steps=10))(0) == 1.0


TINY = OPTIONS["tiny"]


def make(model, **changes):
    arguments = {"ops": plain_ops(), "config": TINY, "dtype": torch.float32}
    return Optimizer(model, **{**arguments, **changes})


def set_gradients(model, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.dtype)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_same_updates_as_torch(scale):
    """Scale 1 is clipped, 1e-4 is not; the decays are not the defaults."""
    ours, theirs = build(DENSE), build(DENSE)
    optimizer = make(ours, config=replace(TINY, beta1=0.8, beta2=0.98, weight_decay=0.2))
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.2},
            {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.98),
        eps=1e-8,
    )
    for step in range(5):
        lr = 1e-2 / (step + 1)
        set_gradients(ours, step, scale)
        set_gradients(theirs, step, scale)
        norm = optimizer.step(lr)
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(norm, expected_norm)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_masters_keep_what_bf16_loses():
    model = build(DENSE)
    start = model.embed.weight.detach().clone()
    optimizer = make(model, config=replace(TINY, weight_decay=0.0), dtype=torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32
    for step in range(20):
        set_gradients(model, step)
        optimizer.step(1e-6)
    master = optimizer.master("embed.weight")
    assert master.dtype == torch.float32
    assert not torch.equal(master, start)
    assert torch.equal(model.embed.weight, master.to(torch.bfloat16))


def run(optimizer: Optimizer, model, steps: range) -> None:
    """Steps on fp32 sums of gradients, which the kernels take on every machine."""
    for step in steps:
        set_gradients(model, step)
        optimizer.accumulate()
        optimizer.step(1e-3)


def assert_equal_tensors(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def test_split_masters_are_the_masters(device):
    """The same kernel with whole masters gives the same bits."""
    ops = cpu_ops("triton", "sdpa")
    optimizers = []
    for splits_masters in (True, False):
        model = build(DENSE).to(device)
        optimizer = make(
            model, ops=replace(ops, splits_masters=splits_masters), dtype=torch.bfloat16
        )
        run(optimizer, model, range(3))
        optimizers.append(optimizer)
    split, whole = optimizers
    assert split.is_split and not whole.is_split
    assert split.masters.keys() == whole.masters.keys()
    for name, remainder in split.masters.items():
        weight, master = split.parameters[name], whole.master(name)
        assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
        assert torch.equal(weight, split_master(master)[0]), name
        assert torch.equal(split.master(name), master), name
    assert_equal_tensors(split.exp_avg, whole.exp_avg)


HOLDERS = {
    "split": ("triton", torch.bfloat16),
    "whole": ("torch", torch.bfloat16),
    "fp32": ("triton", torch.float32),
}
"""what holds the masters: kernels and dtype"""


def make_holder(name: str, device, seed: int):
    kernels, dtype = HOLDERS[name]
    model = build(DENSE, seed).to(device)
    return model, make(model, ops=cpu_ops(kernels, "sdpa"), dtype=dtype)


MUON = replace(TINY, optimizer="muon", weight_decay=0.0, seq_len=64)
LOGICAL_ROWS = {
    "qkv_proj.weight": (64, 32, 32),
    "o_proj.weight": (64,),
    "gate_up_proj.weight": (96, 96),
    "gate_up_weight": (48, 48),
    "down_proj.weight": (64,),
    "down_weight": (64,),
}
"""of `DENSE`, and of `MOE` with two shared experts, by hand"""


SHAPES = {
    "dense": replace(DENSE, tie_word_embeddings=False),
    "moe": replace(MOE, num_shared_experts=2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_muon_moves_each_logical_matrix_along_all_its_directions(shape):
    """Of packed parameters each part and each expert by itself; the rest is AdamW's. Whether the
    weights decay and the momentum is the flag's is seen at values that nobody would take."""
    model = build(shape)
    config = replace(MUON, model=shape, weight_decay=20.0, momentum=0.8, grad_clip=0.0)
    optimizer = make(model, config=config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_gradients(model, 0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimizer.step(1e-2)
    hidden = [name for name in optimizer.parameters if name not in optimizer.exp_avg_sq]
    assert {name.split(".")[-2] for name in optimizer.exp_avg_sq} == (
        {"embed", "norm", "router"} if shape.is_moe else {"embed", "norm", "lm_head"}
    )
    for name in hidden:
        torch.testing.assert_close(optimizer.exp_avg[name], 0.2 * gradients[name])
        update = (0.8 * before[name] - model.state_dict()[name]) / 1e-2
        rows = next(rows for end, rows in LOGICAL_ROWS.items() if name.endswith(end))
        assert logical_rows(name, shape) == rows, name
        for matrix in update.view(-1, *update.shape[-2:]):
            for part in matrix.split(list(rows)):
                values = torch.linalg.svdvals(part) / (0.2 * max(part.shape) ** 0.5)
                # A square matrix may hardly have the last of its directions.
                assert values[:-1].min() > 0.6 and values.max() < 1.3, name


def test_muon_takes_clipped_gradients():
    model = build(DENSE)
    optimizer = make(model, config=replace(MUON, model=DENSE, momentum=0.8, grad_clip=0.5))
    set_gradients(model, 0)
    name = "layers.0.mlp.down_proj.weight"
    gradient = optimizer.parameters[name].grad.clone()
    norm = optimizer.step(1e-2)
    torch.testing.assert_close(optimizer.exp_avg[name], 0.2 * gradient * 0.5 / norm)


def test_muon_updates_kinds_together_that_are_no_larger_than_the_largest():
    """Option a's: gate and up are as large as the others."""
    shapes = {
        "attention.qkv_proj": (1536, 1024),
        "attention.o_proj": (1024, 1024),
        "mlp.gate_up_proj": (2 * 2816, 1024),
        "mlp.down_proj": (1024, 2816),
    }
    gradients = {
        f"layers.{layer}.{name}.weight": torch.empty(shape, device="meta")
        for layer in range(2)
        for name, shape in shapes.items()
    }
    groups = muon_groups(gradients)
    names = [[kind[0].split(".")[3] for kind in kinds] for kinds in groups]
    assert names == [["gate_up_proj"], ["down_proj", "qkv_proj", "o_proj"]]
    assert all([name[:9] for name in kind] == ["layers.0.", "layers.1."] for kind in groups[1])
    # Gradients of another dtype are in launches of their own.
    first = next(iter(gradients))
    gradients[first] = gradients[first].bfloat16()
    assert [[first]] in muon_groups(gradients)


def test_muon_goes_on_from_a_checkpoint(tmp_path, device):
    config = replace(MUON, model=MOE)
    model = build(MOE).to(device)
    optimizer = make(model, config=config)
    run(optimizer, model, range(3))
    saved = save(tmp_path, 3, model, optimizer)
    other_model = build(MOE, 1).to(device)
    other = make(other_model, config=config)
    other.restore(saved)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, model, range(3, 5))
    run(other, other_model, range(3, 5))
    assert_equal_tensors(other.state_tensors(), optimizer.state_tensors())
    assert_equal_tensors(other_model.state_dict(), model.state_dict())


def test_groups_have_learning_rates_of_their_own():
    """A tenth of the rate on a group moves it a tenth as far in AdamW's first step."""

    def moved(**changes) -> list[float]:
        model = build(DENSE)
        weights = model.embed.weight, model.norm.weight
        start = [weight.detach().clone() for weight in weights]
        config = replace(TINY, embedding_weight_decay=0.0, **changes)
        optimizer = make(model, config=config)
        set_gradients(model, 0)
        optimizer.step(1e-2)
        return [(now - then).abs().mean().item() for now, then in zip(weights, start, strict=True)]

    embedding, vector = moved()
    assert moved(embedding_lr=TINY.lr / 10) == [pytest.approx(embedding / 10, rel=1e-3), vector]
    assert moved(vector_lr=TINY.lr / 10) == [embedding, pytest.approx(vector / 10, rel=1e-3)]


def test_the_embedding_has_a_decay_of_its_own():
    decayed = []
    for decay in (0.0, 5.0):
        model = build(DENSE)
        start = model.state_dict()["embed.weight"].clone()
        optimizer = make(model, config=replace(TINY, embedding_weight_decay=decay))
        set_gradients(model, 0)
        optimizer.step(1e-2)
        decayed.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    without, having = decayed
    torch.testing.assert_close(
        without["embed.weight"] - having["embed.weight"], 1e-2 * 5.0 * start, rtol=1e-4, atol=1e-7
    )
    assert all(torch.equal(t, having[n]) for n, t in without.items() if n != "embed.weight")


def save(folder, step: int, model, optimizer: Optimizer) -> Checkpoint:
    saver = BackgroundSaver(folder, keep=0, keep_every=0, join_masters=join_masters)
    saver.begin(
        step,
        model=model.state_dict(),
        optimizer=optimizer.state_tensors(),
        state={},
    )
    saver.close()
    return saver.wait()


@pytest.mark.parametrize("writer", HOLDERS)
def test_masters_go_from_any_run_to_any_other(writer, tmp_path, device):
    model, optimizer = make_holder(writer, device, seed=0)
    run(optimizer, model, range(3))
    saved = save(tmp_path, 3, model, optimizer)
    readers = {reader: make_holder(reader, device, seed=1) for reader in HOLDERS}
    for reader, (_, other) in readers.items():
        other.restore(saved)
        other.load_state_dict(optimizer.state_dict())
        for name, parameter in other.parameters.items():
            assert torch.equal(other.master(name), optimizer.master(name)), (reader, name)
            torch.testing.assert_close(
                parameter.float(), other.master(name), rtol=2**-8, atol=0, msg=f"{reader}: {name}"
            )
        assert_equal_tensors(other.exp_avg, optimizer.exp_avg)
        assert_equal_tensors(other.exp_avg_sq, optimizer.exp_avg_sq)
    other_model, other = readers[writer]
    run(optimizer, model, range(3, 5))
    run(other, other_model, range(3, 5))
    assert_equal_tensors(other.state_tensors(), optimizer.state_tensors())
    assert_equal_tensors(other_model.state_dict(), model.state_dict())


def test_a_checkpoint_does_not_tell_how_masters_were_held(tmp_path, device):
    """`optimizer.safetensors` of a split run, loaded by one with whole masters and saved again."""
    model, optimizer = make_holder("split", device, seed=0)
    run(optimizer, model, range(2))
    saved = save(tmp_path, 2, model, optimizer)
    other_model, other = make_holder("whole", device, seed=1)
    other.restore(saved)
    again = save(tmp_path, 3, other_model, other)
    first, second = (c.path / "optimizer.safetensors" for c in (saved, again))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_or_loss_changes_nothing(value, kind):
    model = build(DENSE)
    optimizer = make(model, config=replace(TINY, model=DENSE, seq_len=64, optimizer=kind))
    set_gradients(model, 0)
    optimizer.step(1e-2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = {n: t.clone() for n, t in optimizer.state_tensors().items()}
    for loss, gradient in ((1.0, value), (value, 1.0)):
        set_gradients(model, 1)
        model.embed.weight.grad[3, 3] = gradient
        assert not torch.isfinite(optimizer.step(1e-2, torch.tensor(loss)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, state[name]), name


def test_accumulation_sums_in_fp32():
    model = build(DENSE)
    optimizer = make(model, dtype=torch.bfloat16)
    expected = torch.zeros(DENSE.vocab_size, DENSE.hidden_size)
    for seed in range(3):
        set_gradients(model, seed)
        expected += model.embed.weight.grad.float()
        optimizer.accumulate()
    assert torch.equal(optimizer.accumulated["embed.weight"], expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.step(1e-3)
    assert optimizer.accumulated == {}


def test_no_clipping_when_grad_clip_is_zero():
    clipped, free = build(DENSE), build(DENSE)
    for model, clip in ((clipped, 1e-3), (free, 0.0)):
        set_gradients(model, 0)
        make(model, config=replace(TINY, grad_clip=clip)).step(1e-2)
    # AdamW's first step is the gradient's sign, whatever its scale: only eps sees the clipping.
    free_step = make(free, config=replace(TINY, grad_clip=0.0))
    set_gradients(free, 1)
    free_step.step(1e-2)
    moments = free_step.exp_avg["embed.weight"]
    torch.testing.assert_close(
        moments.norm(), torch.tensor(0.1 * 128**0.5 * 64**0.5), rtol=0.1, atol=0
    )
