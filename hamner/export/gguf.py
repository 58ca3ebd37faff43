"""The module writes models in llama.cpp's format (GGUF) with the package `gguf`.

Dense models and mixtures of experts both are llama.cpp's architecture "llama". Its RoPE rotates
neighbouring elements of a head, ours the two halves, so the rows of q and k change places; the
scores are the same. With qk-norm they are "qwen3" and "qwen3moe", whose RoPE is ours.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from hamner.checkpoint.saved_model import SavedModel
from hamner.config.model import ModelConfig
from hamner.data.chat_template import END_TOKEN, jinja_template
from hamner.errors import UserError
from hamner.export.hf import architecture, to_hugging_face
from hamner.export.pre_tokenizers import find_pre_tokenizer
from hamner.export.tokenizer import exported_definition
from hamner.model.rotary import scaled_theta

_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(\w+)\.weight")
_ARCHITECTURES = {
    "Llama": gguf.MODEL_ARCH.LLAMA,
    "Mixtral": gguf.MODEL_ARCH.LLAMA,
    "Qwen3": gguf.MODEL_ARCH.QWEN3,
    "Qwen3Moe": gguf.MODEL_ARCH.QWEN3MOE,
}
"""by the name in transformers"""

TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_gguf(path: Path, saved: SavedModel, matrices: str | None = None) -> None:
    """The function writes a model and its tokenizer as one file.

    Args:
        path: of the file.
        saved: the model.
        matrices: how they are stored, of TYPES; None keeps their dtype. Routers keep theirs in any
            case, and so do matrices whose rows a type's blocks do not divide.

    Raises:
        UserError: llama.cpp has no such model or no such tokenizer.
    """
    config, weights = saved.config.model, saved.weights()
    kind = architecture(config)
    if kind not in _ARCHITECTURES:
        raise UserError("--to gguf: llama.cpp has no differential attention; use --to hf")
    pre_tokenizer = find_pre_tokenizer(saved.tokenizer, is_chat=saved.is_chat)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[kind]])
    writer.add_name(saved.name)
    _add_shape(writer, config, saved.config.seq_len)
    is_bf16 = weights["embed.weight"].dtype == torch.bfloat16
    writer.add_file_type(FILE_TYPES[matrices or ("bf16" if is_bf16 else "f32")])
    _add_tokenizer(writer, saved, pre_tokenizer)
    for name, tensor in gguf_tensors(config, weights):
        kind = _type_of(name, tensor, matrices)
        # numpy has no bf16: the package's quantiser rounds, of bf16 what is exact already.
        values = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(name: str, tensor: Tensor, matrices: str | None) -> gguf.GGMLQuantizationType:
    """The type is the one that a tensor is stored in."""
    if matrices and tensor.ndim > 1 and "ffn_gate_inp" not in name:
        kind = TYPES[matrices]
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % block == 0:
            return kind
    return TYPES["bf16"] if tensor.dtype == torch.bfloat16 else gguf.GGMLQuantizationType.F32


def _add_shape(writer: gguf.GGUFWriter, config: ModelConfig, context: int) -> None:
    """The function writes the model's sizes and constants under llama.cpp's names."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.expert_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(scaled_theta(config))
    if config.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling))
        writer.add_rope_scaling_factor(config.rope_scaling_factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling_from)
    writer.add_rope_dimension_count(config.head_size)
    if config.is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_token)
    if config.qk_norm:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        if config.is_moe:
            writer.add_expert_feed_forward_length(config.expert_intermediate_size)


def gguf_tensors(
    config: ModelConfig, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The iterator gives parameters llama.cpp's name and layout, with a layer's experts stacked."""
    kind = _ARCHITECTURES[architecture(config)]
    is_interleaved = kind == gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in to_hugging_face(config, weights).items():
        if match := _EXPERT.fullmatch(name):
            name = f"{match[1]}.{match[2]}.weight"
            experts.setdefault(name, []).append(tensor)
            if len(experts[name]) < config.num_experts:
                continue
            tensor = torch.stack(experts[name])
        elif is_interleaved and name.endswith("q_proj.weight"):
            tensor = _interleave_halves(tensor, config.num_attention_heads)
        elif is_interleaved and name.endswith("k_proj.weight"):
            tensor = _interleave_halves(tensor, config.num_kv_heads)
        yield names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous()


def _interleave_halves(weight: Tensor, heads: int) -> Tensor:
    """The function moves rows (heads, 2, head size / 2) to (heads, head size / 2, 2)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: gguf.GGUFWriter, saved: SavedModel, pre_tokenizer: str) -> None:
    tokenizer, rows = saved.tokenizer, saved.config.model.vocab_size
    definition = exported_definition(tokenizer)
    # Rows of the embedding beyond the tokenizer get names, since llama.cpp counts by the names.
    tokens = [f"<|unused_{i}|>" for i in range(rows)]
    kinds = np.full(rows, gguf.TokenType.UNUSED)
    for token, token_id in definition["model"]["vocab"].items():
        tokens[token_id], kinds[token_id] = token, gguf.TokenType.NORMAL
    for token in definition["added_tokens"]:
        token_id = tokenizer.special_id(token["content"])
        tokens[token_id] = token["content"]
        is_control = token["special"]
        kinds[token_id] = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds.tolist())
    merges = definition["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if saved.is_chat:
        end = tokenizer.eot_id if tokenizer.text_tags else tokenizer.special_id(END_TOKEN)
        writer.add_eot_token_id(end)
        writer.add_chat_template(jinja_template(tokenizer))
