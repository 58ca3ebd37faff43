"""Exports as their readers see them: transformers, and what llama.cpp reads."""

import json
import re
import sys
from dataclasses import replace
from functools import partial

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hamner.data.chat_template import Message, render_prompt
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.export.__main__ import ExportConfig, export, main
from hamner.model.generate import Generator
from hamner.model.sampling import Sampling
from hamner.model.transformer import Transformer
from tests import forked
from tests.imports import output_without
from tests.models import DENSE, MOE, cpu_ops
from tests.saved import save_run, sharp

VOCABULARY = 600
"""special tokens, bytes and some merges"""
DENSE_ = replace(DENSE, vocab_size=VOCABULARY)
MOE_ = replace(MOE, vocab_size=VOCABULARY)
SHAPES = {
    "Llama": DENSE_,
    "Llama, untied": replace(DENSE_, tie_word_embeddings=False, num_kv_heads=4),
    "Llama, other constants": replace(DENSE_, rope_theta=500_000.0, rms_norm_eps=1e-3),
    "Mixtral": MOE_,
    "Mixtral, untied": replace(
        MOE_, tie_word_embeddings=False, num_experts=5, num_experts_per_token=3
    ),
    "DiffLlama": replace(DENSE_, use_differential_attention=True),
    "Qwen3": replace(DENSE_, qk_norm=True),
    "Qwen3Moe": replace(MOE_, qk_norm=True),
}
GREEDY = Sampling(temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(vocab_size=VOCABULARY)


def exported(tmp_path, model, to: str, **kwargs):
    run = save_run(tmp_path / "run", model, **kwargs)
    return export(ExportConfig(tmp_path / "out" / f"model.{to}", to, run))


def from_pretrained(folder, **kwargs):
    """As a user loads it, and nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **kwargs
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def assert_same_model(ours, theirs, tokenizer):
    """Equal logits, and equal text at temperature 0."""
    inputs = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = ours(inputs).logits, theirs(inputs).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    prompt = inputs[0, :20].tolist()
    decoded = list(Generator(ours, tokenizer).tokens(prompt, GREEDY, seed=0, unpenalized=()))
    generated = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=44, do_sample=False, eos_token_id=-1
    )
    assert generated[0, 20:].tolist() == decoded
    assert len(set(decoded)) > 5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_hugging_face_loads_the_same_model(shape, tmp_path, tokenizer):
    model = sharp(shape)
    folder = exported(tmp_path, model, "hf")
    theirs = from_pretrained(folder)
    kind = next(name for name, config in SHAPES.items() if config == shape).partition(",")[0]
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    assert theirs.num_parameters() == shape.num_parameters()
    # Some readers go by this rather than by the weights that are there.
    assert theirs.config.tie_word_embeddings == shape.tie_word_embeddings
    assert_same_model(model, theirs, tokenizer)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_hugging_face_stretches_positions_as_we_do(shape, scaling, tmp_path):
    model = sharp(replace(shape, max_seq_len=128, rope_scaling=scaling, rope_scaling_from=32))
    theirs = from_pretrained(exported(tmp_path, model, "hf"))
    inputs = torch.randint(VOCABULARY, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = theirs(inputs).logits, model(inputs).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
@pytest.mark.parametrize(
    "shape", [DENSE_, MOE_, SHAPES["Qwen3"]], ids=["Llama", "Mixtral", "Qwen3"]
)
def test_the_kernels_compute_what_hugging_face_does(shape, tmp_path):
    """Not only the plain operations, with which a saved model is used on a CPU."""
    model = sharp(shape)
    theirs = from_pretrained(exported(tmp_path, model, "hf"))
    kernels = Transformer(shape, cpu_ops("triton", "triton"))
    kernels.load_state_dict(model.state_dict())
    inputs = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = kernels(inputs).logits, theirs(inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_bf16_stays_bf16_and_norms_stay_fp32(tmp_path):
    model = sharp(DENSE_)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.001)
    folder = exported(tmp_path, model, "hf", dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    weights = from_pretrained(folder).state_dict()
    norm = weights["model.layers.1.input_layernorm.weight"]
    assert torch.equal(norm, model.layers[1].attention.norm.weight)
    assert torch.equal(
        weights["model.layers.1.self_attn.o_proj.weight"],
        model.layers[1].attention.o_proj.weight.bfloat16().float(),
    )


CONVERSATION = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "What is 2 + 2? \n"},
    {"role": "assistant", "content": "Four — 4."},
    {"role": "user", "content": "And naïve 你好?"},
]


def test_tokenizer_and_chat_template(tmp_path, tokenizer):
    folder = exported(tmp_path, sharp(DENSE_), "hf", chat=True)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "Don't split   naïve 你好 1234567\n\n\tcode() 👩‍👩‍👧 e\u0301"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    prompt = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt([Message(**turn) for turn in CONVERSATION], tokenizer)
    assert theirs.eos_token_id == tokenizer.eot_id
    assert theirs.model_max_length == DENSE_.max_seq_len
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [tokenizer.eot_id, tokenizer.special_id("<|end|>")]
    drawn = generation.do_sample, generation.temperature, generation.top_k, generation.top_p
    assert drawn == (True, Sampling().temperature, Sampling().top_k, Sampling().top_p)


def test_the_context_is_the_length_trained_at(tmp_path):
    model = sharp(DENSE_)
    folder = exported(tmp_path, model, "hf", seq_len=32)
    assert transformers.AutoConfig.from_pretrained(folder).max_position_embeddings == 32
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 32
    path = export(ExportConfig(tmp_path / "model.gguf", "gguf", tmp_path / "run"))
    assert fields(gguf.GGUFReader(path))["llama.context_length"] == 32


def test_a_base_model_has_no_chat_template(tmp_path, tokenizer):
    folder = exported(tmp_path, sharp(DENSE_), "hf")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    config = json.loads((folder / "config.json").read_text())
    # Whoever puts the one before a text gives the model what no training did.
    assert (config["eos_token_id"], config["bos_token_id"]) == (tokenizer.eot_id, None)


@pytest.mark.parametrize(
    ("shape", "unread"),
    [
        (DENSE_, {}),
        (SHAPES["Llama, untied"], {}),
        (SHAPES["Qwen3"], {"head_dim": 16}),
        (SHAPES["Qwen3Moe"], {"moe_intermediate_size": 48, "norm_topk_prob": True}),
    ],
    ids=["tied", "untied", "Qwen3", "Qwen3Moe"],
)
def test_gguf_is_read_back_as_the_same_model(shape, unread, tmp_path, tokenizer):
    """By transformers, whose reader undoes llama.cpp's layout; it reads no Mixtral.

    What it does not read of Qwen3's metadata, which has sizes of its own, the test gives it.
    """
    model = sharp(shape)
    file = exported(tmp_path, model, "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **unread
    )
    assert_same_model(model, theirs, tokenizer)


def test_experts_in_gguf_are_stacked(tmp_path):
    model = sharp(MOE_)
    reader = gguf.GGUFReader(exported(tmp_path, model, "gguf"))
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    mlp = model.layers[1].mlp
    gate, up = mlp.gate_up_weight.detach().chunk(2, dim=1)
    assert torch.equal(tensors["blk.1.ffn_gate_inp.weight"], mlp.router.weight)
    assert torch.equal(tensors["blk.1.ffn_gate_exps.weight"], gate)
    assert torch.equal(tensors["blk.1.ffn_up_exps.weight"], up)
    assert torch.equal(tensors["blk.1.ffn_down_exps.weight"], mlp.down_weight)
    assert not [name for name in tensors if "experts" in name or name.startswith("layers")]


def fields(reader: gguf.GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def test_gguf_metadata(tmp_path, tokenizer):
    shape = replace(MOE_, vocab_size=tokenizer.vocab_size)
    reader = gguf.GGUFReader(exported(tmp_path, sharp(shape), "gguf", chat=True))
    values = fields(reader)
    expected = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10_000.0,
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smaug-bpe",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: values[name] for name in expected} == expected
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    model = tokenizer.definition["model"]
    tokens = values["tokenizer.ggml.tokens"]
    assert {token: i for i, token in enumerate(tokens)} == model["vocab"]
    assert values["tokenizer.ggml.merges"] == [" ".join(pair) for pair in model["merges"]]
    assert values["tokenizer.ggml.token_type"] == [3] * 5 + [1] * (VOCABULARY - 5)
    assert "<|assistant|>" in values["tokenizer.chat_template"]


def test_gguf_tensors_are_exact_and_rows_of_q_and_k_interleaved(tmp_path):
    model = sharp(DENSE_)
    reader = gguf.GGUFReader(exported(tmp_path, model, "gguf", dtype=torch.bfloat16))
    assert fields(reader)["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
    names += ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    assert set(tensors) == {"token_embd.weight", "output_norm.weight"} | {
        f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in names
    }
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    q = tensors["blk.1.attn_q.weight"]
    assert q.tensor_type == gguf.GGMLQuantizationType.BF16
    stored = gguf.quants.dequantize(q.data, q.tensor_type)
    packed = model.layers[1].attention.qkv_proj.weight.detach().bfloat16().float()
    ours = packed[:64].reshape(4, 2, 8, 64).numpy()
    # Head 1, pair 3: element 3 of each half, side by side.
    np.testing.assert_array_equal(stored[16 + 6], ours[1, 0, 3])
    np.testing.assert_array_equal(stored[16 + 7], ours[1, 1, 3])


def test_qk_norm_is_llama_cpps_qwen3(tmp_path):
    model = sharp(SHAPES["Qwen3"])
    with torch.no_grad():
        model.layers[1].attention.k_norm.weight.mul_(1.001)
    reader = gguf.GGUFReader(exported(tmp_path, model, "gguf", dtype=torch.bfloat16))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    norm = tensors["blk.1.attn_k_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    weight = model.layers[1].attention.k_norm.weight.detach()
    assert torch.equal(torch.tensor(norm.data), weight)
    assert {f"blk.{layer}.attn_q_norm.weight" for layer in (0, 1)} <= set(tensors)
    # Its RoPE turns the two halves, as ours: the rows of q stay where they are.
    q = tensors["blk.1.attn_q.weight"]
    stored = torch.tensor(gguf.quants.dequantize(q.data, q.tensor_type))
    packed = model.layers[1].attention.qkv_proj.weight.detach()[:64]
    assert torch.equal(stored, packed.bfloat16().float())
    values = fields(reader)
    expected = {"attention.key_length": 16, "attention.value_length": 16, "block_count": 2}
    assert values["general.architecture"] == "qwen3"
    assert {name: values[f"qwen3.{name}"] for name in expected} == expected


def test_experts_with_qk_norm_have_their_width_in_gguf(tmp_path):
    """Llama.cpp would take it for the dense width over the experts of a token otherwise."""
    values = fields(gguf.GGUFReader(exported(tmp_path, sharp(SHAPES["Qwen3Moe"]), "gguf")))
    assert values["general.architecture"] == "qwen3moe"
    assert values["qwen3moe.expert_feed_forward_length"] == 48


def test_rows_beyond_the_tokenizer_have_a_name_in_gguf(tmp_path, tokenizer):
    definition = tmp_path / "small.json"
    tokenizer.cut(500).save(definition)
    model = sharp(DENSE_)
    run = save_run(tmp_path / "run", model, tokenizer=str(definition))
    reader = gguf.GGUFReader(export(ExportConfig(tmp_path / "model.gguf", "gguf", run)))
    tokens = fields(reader)["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == VOCABULARY
    assert fields(reader)["tokenizer.ggml.token_type"][500:] == [5] * 100


@pytest.mark.parametrize(
    ("shape", "to", "reason"),
    [
        (replace(MOE_, num_shared_experts=1), "hf", "shared experts"),
        (replace(MOE_, num_shared_experts=1), "gguf", "shared experts"),
        (replace(MOE_, use_differential_attention=True), "hf", "differential attention with"),
        (replace(DENSE_, use_differential_attention=True), "gguf", "no differential attention"),
    ],
)
def test_what_no_reader_knows_is_refused(shape, to, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        exported(tmp_path, sharp(shape), to)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "hamner.export.gguf", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install -e '\.\[gguf\]'"):
        exported(tmp_path, sharp(DENSE_), "gguf")


command = partial(forked.run_module, "hamner.export")


def test_command(tmp_path):
    run = save_run(tmp_path / "runs" / "mine", sharp(DENSE_))
    # Without --checkpoint: the run in runs/ that saved last.
    result = command("--to", "hf", "out", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "wrote out\n"), result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    again = command("--checkpoint", str(run), "--to", "hf", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == "error: out exists already: name another output, or remove it\n"
    with pytest.raises(UserError, match="--checkpoint nowhere is neither"):
        main(["--checkpoint", "nowhere", "--to", "gguf", str(tmp_path / "x.gguf")])
    assert not (tmp_path / "x.gguf").exists()


def test_help_does_not_load_torch():
    output = output_without(["torch"], "hamner.export", "--help")
    assert {"--to", "--checkpoint"} <= set(re.findall(r"--[a-z-]+", output))
