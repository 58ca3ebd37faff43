"""RoPE's scaling equals that of transformers, and keeps what each kind promises."""

import math
from dataclasses import replace

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.model import ModelConfig
from hamner.errors import UserError
from hamner.export.gguf import write_gguf
from hamner.export.hf import hugging_face_config, to_hugging_face
from hamner.model.rotary import attention_factor, frequencies, rotary_tables
from tests.models import DENSE, build
from tests.saved import save_run

LONG = ModelConfig(max_seq_len=4096, rope_scaling_from=1024)
KINDS = ("linear", "ntk", "yarn")
THEIR_NAMES = {"linear": "linear", "ntk": "dynamic", "yarn": "yarn"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [256, 1024, 3000])
def test_equal_to_transformers(kind, trained):
    config = replace(LONG, rope_scaling=kind, rope_scaling_from=trained)
    theirs = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=trained,
        rope_parameters={
            "rope_type": THEIR_NAMES[kind],
            "rope_theta": config.rope_theta,
            # Theirs is dynamic: at factor 1 its base is that of the sequence's own length.
            "factor": 1.0 if kind == "ntk" else config.rope_scaling_factor,
            "original_max_position_embeddings": trained,
        },
    )
    function = ROPE_INIT_FUNCTIONS[THEIR_NAMES[kind]]
    their_frequencies, their_factor = function(theirs, "cpu", seq_len=config.max_seq_len)
    torch.testing.assert_close(frequencies(config).float(), their_frequencies, rtol=2e-6, atol=0)
    assert attention_factor(config) == pytest.approx(their_factor)


def test_what_each_kind_does_to_the_fastest_and_the_slowest_pair():
    plain = frequencies(replace(LONG, rope_scaling="none"))
    slowed = {kind: plain / frequencies(replace(LONG, rope_scaling=kind)) for kind in KINDS}
    torch.testing.assert_close(slowed["linear"], torch.full_like(plain, 4.0))
    for kind in ("ntk", "yarn"):
        assert slowed[kind][0] == 1
        assert slowed[kind][-1] == pytest.approx(4.0)
        assert bool((slowed[kind].diff() >= 0).all())


def test_tables_without_scaling_are_plain_rope():
    config = replace(LONG, rope_scaling="none", rope_scaling_from=0)
    cos, sin = rotary_tables(config, 10)
    assert cos.shape == sin.shape == (10, config.head_size // 2)
    assert cos.dtype == sin.dtype == torch.float32
    angle = 7 * 10_000.0 ** (-2 * 3 / config.head_size)
    assert cos[7, 3].item() == pytest.approx(math.cos(angle), abs=1e-7)
    assert sin[7, 3].item() == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_model_computes_the_same(kind):
    """The Llama of transformers with the exported config.json gives our logits."""
    config = replace(DENSE, max_seq_len=64, rope_scaling=kind, rope_scaling_from=16)
    model = build(config)
    values = hugging_face_config(config, dtype=torch.float32, context=64, eos_ids=[0])
    # The others' formulas have no such length, and transformers warns of it.
    lengths = {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    scaling = {"rope_type": kind, "factor": 4.0, **lengths}
    assert values.get("rope_scaling") == (None if kind == "ntk" else scaling)
    theirs = LlamaForCausalLM(LlamaConfig(**values)).eval()
    missing, unexpected = theirs.load_state_dict(
        to_hugging_face(config, dict(model.named_parameters())), strict=False
    )
    assert set(missing) <= {"lm_head.weight"}
    assert unexpected == []
    tokens = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = theirs(tokens).logits - model(tokens).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_says_how_positions_are_scaled(kind, tmp_path):
    config = replace(DENSE, vocab_size=600, max_seq_len=64, rope_scaling=kind, rope_scaling_from=16)
    write_gguf(tmp_path / "model.gguf", find_saved_model(save_run(tmp_path / "x", build(config))))
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    values = {name: field.contents() for name, field in fields.items() if ".rope." in name}
    scaled = {
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.scaling.type": kind,
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    raised = {
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": pytest.approx(10_000.0 * 4 ** (16 / 14)),
    }
    assert values == (raised if kind == "ntk" else scaled)


@pytest.mark.parametrize("trained", [0, 4096, 5000])
def test_nothing_to_stretch_is_refused(trained):
    with pytest.raises(UserError, match=f"--rope-scaling-from {trained} must be above 0"):
        replace(LONG, rope_scaling="yarn", rope_scaling_from=trained)
