"""The options have exactly the sizes they are documented with."""

import math
from dataclasses import replace

import pytest
import torch

from hamner.config import model as limits
from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.kernels import moe_routing
from tests.models import plain_ops

SIZES = {
    "tiny": (4_000_000, 4_000_000),
    "current": (163_609_344, 163_609_344),
    "a": (320_914_432, 320_914_432),
    "a-short": (320_914_432, 320_914_432),
    "b": (264_297_216, 264_297_216),
    "c": (352_414_464, 210_856_704),
    "c-shared": (352_399_104, 281_620_224),
}


def test_all_options_are_covered():
    assert set(SIZES) == set(OPTIONS)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    from hamner.model.transformer import Transformer

    model = OPTIONS[name].model
    with torch.device("meta"):
        built = Transformer(model, plain_ops())
    total, active = SIZES[name]
    assert sum(p.numel() for p in built.parameters()) == total
    assert model.num_parameters() == total
    assert model.num_parameters(active=True) == active


@pytest.mark.parametrize(
    "changes",
    [
        {"use_differential_attention": True},
        {"qk_norm": True},
        {"tie_word_embeddings": False},
        {"num_experts": 3, "num_experts_per_token": 1, "num_shared_experts": 2},
    ],
)
def test_counts_follow_any_shape(changes):
    from hamner.model.transformer import Transformer

    config = replace(OPTIONS["tiny"].model, **changes)
    with torch.device("meta"):
        built = Transformer(config, plain_ops())
    assert sum(p.numel() for p in built.parameters()) == config.num_parameters()


def test_schedule_of_option_a():
    option = OPTIONS["a"]
    assert option.tokens_per_step == 24_576
    assert option.tokens // option.tokens_per_step == 406_901


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_kv_heads": 5}, "--num-kv-heads 5"),
        ({"num_attention_heads": 15}, "--hidden-size 1024"),
        ({"hidden_size": 16}, "head size 1"),
        ({"num_layers": 0}, "--num-layers"),
        ({"num_experts": 2, "num_experts_per_token": 3}, "--num-experts-per-token 3"),
        ({"num_experts": 2}, "--num-experts-per-token 0"),
        ({"num_shared_experts": 1}, "--num-experts above 0"),
        ({"num_layers": 10**20}, "--num-layers 100000000000000000000 must be at most 1,000"),
        (
            {"num_experts": 1, "num_experts_per_token": 1},
            "--num-experts 1 must be between 2 and 64",
        ),
        ({"num_experts": 65, "num_experts_per_token": 1}, "--num-experts 65 must be between"),
        ({"num_experts": 16, "num_experts_per_token": 9}, "--num-experts-per-token 9 must be"),
        ({"router_aux_loss_coef": -1.0}, "--router-aux-loss-coef must not be negative"),
        ({"router_aux_loss_coef": math.nan}, "--router-aux-loss-coef must not be negative"),
        ({"router_z_loss_coef": math.inf}, "--router-z-loss-coef must not be negative, and finite"),
        ({"rms_norm_eps": math.inf}, "--rms-norm-eps must be above 0 and finite"),
        ({"vocab_size": 0}, "--vocab-size"),
        ({"rope_theta": 0.0}, "--rope-theta"),
        ({"use_differential_attention": True, "num_kv_heads": 1}, "--num-kv-heads 1"),
        ({"use_differential_attention": True, "qk_norm": True}, "--qk-norm and"),
    ],
)
def test_nonsense_is_one_sentence(changes, named):
    with pytest.raises(UserError) as raised:
        replace(ModelConfig(), **changes)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_mixture_has_the_experts_that_routing_takes():
    for name in ("MAX_EXPERTS", "MAX_EXPERTS_PER_TOKEN"):
        assert getattr(limits, name) == getattr(moe_routing, name)
    replace(ModelConfig(), num_experts=64, num_experts_per_token=8)
