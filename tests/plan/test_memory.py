"""The memory account and the choice it leads to."""

from dataclasses import replace

import pytest
import torch

from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.hardware import GIB
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.ops import build_ops
from hamner.model.transformer import Transformer
from hamner.plan import costs, memory
from hamner.plan.communication import Parallelism
from hamner.plan.memory import FULL, NONE, SELECTIVE

A = OPTIONS["a"].model


def test_kept_bytes_of_option_a():
    assert NONE.kept_bytes(A, 2, fused=True) == 2 * 15_104 + 64
    assert SELECTIVE.kept_bytes(A, 2, fused=True) == 2 * 10_240 + 64
    assert FULL.kept_bytes(A, 2, fused=True) == 2 * 1_024


def test_qk_norm_is_recomputed():
    normed = replace(A, qk_norm=True)
    for policy, more in ((NONE, 2 * (1024 + 256)), (SELECTIVE, 0), (FULL, 0)):
        kept = policy.kept_bytes(A, 2, fused=True)
        assert policy.kept_bytes(normed, 2, fused=True) == kept + more


MODELS = {
    "dense": A,
    "moe": OPTIONS["c"].model,
    "shared expert": OPTIONS["c-shared"].model,
    "differential": replace(A, use_differential_attention=True),
    "qk-norm": replace(A, qk_norm=True),
}


def bytes_autograd_keeps(model: ModelConfig, policy) -> float:
    """Per token, counted over storages that are not parameters', at the real widths."""
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    asked = {"device": cpu, "dtype": bf16, "seq_len": 16, "micro_batch_size": 4}
    attention = get_attention("sdpa", AttentionShape.of_model(model, **asked))
    transformer = Transformer(model, build_ops("torch", attention), (policy,) * model.num_layers)
    transformer.initialize(0)
    for parameter in transformer.matrices():
        parameter.data = parameter.data.to(bf16)
    parameters = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(model.vocab_size, (4, 17), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        transformer(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return sum(storage.nbytes() for storage in kept.values()) / 64


@pytest.mark.parametrize("policy", [NONE, SELECTIVE, FULL], ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", MODELS)
def test_account_is_what_autograd_keeps(name, policy):
    """Of a layer: two of them less one. The plain ops run on any machine."""
    one, two = (replace(MODELS[name], num_layers=n, vocab_size=256) for n in (1, 2))
    kept = bytes_autograd_keeps(two, policy) - bytes_autograd_keeps(one, policy)
    assert policy.kept_bytes(one, 2, fused=False) == pytest.approx(kept, rel=0.02)


def test_a_mixture_keeps_what_a_dense_layer_of_its_active_width_does():
    c = OPTIONS["c"].model
    width = c.num_experts_per_token * c.expert_intermediate_size
    dense = replace(c, num_experts=0, num_experts_per_token=0, expert_intermediate_size=width)
    assert not dense.is_moe
    assert SELECTIVE.kept_bytes(c, 2, fused=True) == SELECTIVE.kept_bytes(dense, 2, fused=True)


def test_muon_has_no_second_moment():
    plan, muon = (
        memory.account(replace(OPTIONS["a"], optimizer=name), (SELECTIVE,) * 24, 24)
        for name in ("adamw", "muon")
    )
    assert plan.total - muon.total == plan.optimizer - muon.optimizer == 4 * 270_532_608
    assert plan.update == 0


def test_muons_update_may_be_the_peak():
    """Updates of gate and up, and copies, and three squares of down, q and o, in 16 bits, beside
    gradients."""
    tiny = replace(OPTIONS["a"], optimizer="muon", batch_size=1, seq_len=64)
    account = memory.account(tiny, (FULL,) * 24, 1)
    assert set(account.parts()) == {"weights", "optimizer", "gradients", "update"}
    assert account.update == 24 * (4 * 2816 * 1024 + 9 * 1024**2) * 2


def test_peak_is_the_loss_or_the_backward_pass():
    kept = memory.account(OPTIONS["a"], (SELECTIVE,) * 24, 24)
    assert kept.total == sum(kept.parts().values())
    assert set(kept.parts()) == {"weights", "optimizer", "activations", "loss"}
    recomputed = memory.account(replace(OPTIONS["a"], batch_size=48), (FULL,) * 24, 24)
    assert recomputed.total == sum(recomputed.parts().values())
    assert "activations and gradients in backward" in recomputed.parts()
    assert recomputed.gradient_sums == 4 * A.num_parameters()
    # Bytes a parameter: bf16 weights and gradients, two fp32 moments, and of the fp32 masters what
    # the weights lack. Plain torch keeps whole masters.
    plain = memory.account(OPTIONS["a"], (SELECTIVE,) * 24, 24, fused=False)
    for account, size in ((kept, 14), (plain, 16)):
        state = account.weights + account.gradients + account.optimizer
        assert state == size * A.num_parameters()


def test_backward_holds_what_is_kept_what_is_formed_and_one_block():
    """Of a large batch it peaks at the last block, when the head's gradient alone is formed; of a
    small one at the first, when nearly all are."""
    embedding = 49_152 * 1024
    block = (A.num_parameters() - embedding - 1024) // 24
    # The block again, selective; of its MLP three gradients of the inner width and two of x's.
    working = 2 * 10_240 + 64 + 2 * (3 * 2816 + 2 * 1024)
    large = memory.account(OPTIONS["a"], (FULL,) * 24, 24)
    assert large.backward == 24_576 * (24 * 2048 + working) + 2 * embedding
    small = replace(OPTIONS["a"], batch_size=1, seq_len=64)
    small = memory.account(small, (FULL,) * 24, 1)
    assert small.backward == 64 * (2048 + working) + 2 * (embedding + 23 * block)


def test_an_evaluation_holds_a_block_or_the_loss():
    kept, tokens = 2 * 15_104 + 64, 24_576
    stream = 2 * 2 * 1024 * tokens
    found = memory.evaluation_bytes(A, tokens, "bf16", fused=True)
    assert found == stream + max(kept * tokens, costs.loss_held(A, tokens, 2, fused=True))
    found = memory.evaluation_bytes(A, 1024, "bf16", fused=True)
    assert found == stream // 24 + costs.loss_held(A, 1024, 2, fused=True)


def choose(budget_gib: float, config: TrainConfig = OPTIONS["a"], **how):
    return memory.choose(config, int(budget_gib * GIB), **how)


def test_choice_degrades_step_by_step():
    """Selective everywhere, then a few full layers, then more, then a smaller micro-batch."""
    assert memory.describe(choose(24).policies) == "selective"
    some, more, least = choose(14), choose(10), choose(5.5)
    count = [sum(p is FULL for p in plan.policies) for plan in (some, more)]
    assert 0 < count[0] < count[1] <= 24
    assert some.micro_batch_size == more.micro_batch_size == 24
    assert least.micro_batch_size < 24
    # All of a step's micro-batches are alike.
    sizes = {choose(5.5 + 0.05 * n).micro_batch_size for n in range(6)}
    assert len(sizes) > 2 and all(24 % size == 0 for size in sizes)
    for budget, plan in ((14, some), (10, more), (5.5, least)):
        assert plan.account.total <= budget * GIB


def test_what_fits_to_the_byte_fits():
    total = memory.account(OPTIONS["a"], (SELECTIVE,) * 24, 24).total
    fits, too_small = (memory.choose(OPTIONS["a"], budget) for budget in (total, total - 1))
    assert [memory.describe(plan.policies) for plan in (fits, too_small)] == ["selective", "full:1"]


def test_fewest_full_layers():
    plan = choose(14)
    full = sum(p is FULL for p in plan.policies)
    fewer = memory.mixed(full - 1, 24)
    account = memory.account(OPTIONS["a"], fewer, 24)
    assert account.total > 14 * GIB


def test_impossible_budget_says_the_least_that_fits():
    with pytest.raises(UserError, match=r"--vram-budget 2 GiB is too small: the least .* GiB"):
        choose(2)


def test_given_policy_and_micro_batch_are_kept():
    plan = choose(1, replace(OPTIONS["a"], micro_batch_size=12), policies=(NONE,) * 24)
    assert plan.policies == (NONE,) * 24
    assert plan.micro_batch_size == 12


def test_gradient_checkpointing_off_recomputes_nothing():
    model = replace(A, gradient_checkpointing=False)
    plan = choose(16, replace(OPTIONS["a"], model=model))
    assert memory.describe(plan.policies) == "none"
    assert plan.micro_batch_size < 24


@pytest.mark.parametrize("text", ["none", "selective", "full", "full:8"])
def test_parse_and_describe_agree(text):
    assert memory.describe(memory.parse(text, 24)) == text


def test_auto_is_left_open():
    assert memory.parse("auto", 24) is None


@pytest.mark.parametrize("text", ["everything", "full:x", "full:25", "selective:3"])
def test_unknown_policy_is_one_sentence(text):
    with pytest.raises(UserError, match="--recompute"):
        memory.parse(text, 24)


@pytest.mark.parametrize(("tokens", "vocab_size"), [(24_576, 49_152), (1, 100), (49_152, 4_096)])
@pytest.mark.parametrize("element_size", [2, 4])
def test_loss_chunk_is_the_kernels(tokens, vocab_size, element_size):
    from hamner.kernels.cross_entropy import default_chunk_size

    expected = default_chunk_size(tokens, vocab_size, element_size)
    assert costs.loss_chunk(vocab_size, tokens, element_size) == expected


def test_plain_torch_keeps_everything_while_it_fits():
    assert memory.describe(choose(70, fused=False).policies) == "none"
    assert memory.describe(choose(70).policies) == "selective"
    assert memory.describe(choose(30, fused=False).policies) == "selective"


def test_automatic_micro_batch_may_be_bounded():
    assert choose(70, max_micro_batch_tokens=8_192).micro_batch_size == 8
    assert choose(70, max_micro_batch_tokens=100).micro_batch_size == 1
    given = replace(OPTIONS["a"], micro_batch_size=12)
    assert choose(70, given, max_micro_batch_tokens=100).micro_batch_size == 12


@pytest.mark.parametrize("option", ["a", "c"])
def test_int8_takes_at_most_two_percent_more(option):
    config, policies = OPTIONS[option], (SELECTIVE,) * OPTIONS[option].model.num_layers
    bf16, *int8 = (
        memory.account(replace(config, matmul=matmul), policies, 24).total
        for matmul in ("bf16", "int8", "int8-all")
    )
    assert all(bf16 <= total <= 1.02 * bf16 for total in int8)


def test_int8_is_refused_with_fsdp():
    config = replace(OPTIONS["a"], matmul="int8")
    ddp, fsdp = (Parallelism(kind, 2, 1) for kind in ("ddp", "fsdp"))
    memory.choose(config, 20 * GIB, parallelism=ddp)
    with pytest.raises(UserError, match="--matmul int8 trains with --parallel ddp only") as error:
        memory.choose(config, 20 * GIB, parallelism=fsdp)
    assert "\n" not in str(error.value)
    memory.choose(replace(config, matmul="bf16"), 20 * GIB, parallelism=fsdp)
