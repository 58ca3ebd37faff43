"""The module writes models in Hugging Face's format: transformers' names, shapes and config.json.

    dense                        LlamaForCausalLM
    mixture of experts           MixtralForCausalLM
    differential attention       DiffLlamaForCausalLM
    qk-norm                      Qwen3ForCausalLM, of a mixture Qwen3MoeForCausalLM

Weights are under the names in which these models are published, so every reader of theirs reads
ours. Nothing here needs transformers.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hamner.checkpoint.saved_model import SavedModel
from hamner.config.model import ModelConfig
from hamner.config.train import TOKENIZER_FILE
from hamner.data.chat_template import END_TOKEN, jinja_template
from hamner.data.tokenizer import SPECIAL_TOKENS, write_definition
from hamner.errors import UserError
from hamner.export.card import model_card
from hamner.export.tokenizer import exported_definition, require_same_ids
from hamner.files import usual_permissions
from hamner.model.rotary import scaled_theta
from hamner.model.sampling import Sampling

_CAN_BE_EXPORTED = (
    "only dense models, mixtures without shared experts and dense models with differential "
    "attention can be exported"
)


MODEL_TYPES = {"Qwen3Moe": "qwen3_moe"}
"""of those whose name in config.json is not the class's in lower case"""


def write_hugging_face(folder: Path, saved: SavedModel) -> None:
    """The function makes a folder that AutoModelForCausalLM and AutoTokenizer load.

    Raises:
        UserError: transformers has no model of this shape, or its tokenizer would give other ids
            than training; nothing is written then.
    """
    tokenizer, shape = saved.tokenizer, saved.config.model
    weights = saved.weights()
    context, dtype = saved.config.seq_len, weights["embed.weight"].dtype
    end_of_text = tokenizer.text_of(tokenizer.eot_id)
    eos_ids = [tokenizer.eot_id]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    if saved.is_chat:
        tokenizer_config["chat_template"] = jinja_template(tokenizer)
        if not tokenizer.text_tags:
            eos_ids.append(tokenizer.special_id(END_TOKEN))
            tokenizer_config["additional_special_tokens"] = list(SPECIAL_TOKENS[1:])
    model_config = hugging_face_config(shape, dtype=dtype, context=context, eos_ids=eos_ids)
    definition = exported_definition(tokenizer)
    require_same_ids(tokenizer, definition, is_chat=saved.is_chat)
    folder.mkdir()
    tensors = {name: t.contiguous() for name, t in to_hugging_face(shape, weights).items()}
    with usual_permissions(folder / "model.safetensors"):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_definition(folder / TOKENIZER_FILE, definition)
    generation_config = {"eos_token_id": model_config["eos_token_id"], "pad_token_id": eos_ids[0]}
    if saved.is_chat:
        generation_config |= _sampling()
    card = model_card(saved, model_config)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name, values in (
        ("config.json", model_config),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
    ):
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _sampling() -> dict:
    """The settings are hamner.chat's defaults, by which others draw too unless they say otherwise.

    The repetition penalty is not among them: it would also apply to greedy decoding.
    """
    chat = Sampling()
    names = ("temperature", "top_k", "top_p")
    return {"do_sample": True, **{name: getattr(chat, name) for name in names}}


def architecture(config: ModelConfig) -> str:
    """The function names the model in transformers, without "ForCausalLM".

    Raises:
        UserError: transformers has no model of this shape.
    """
    if reason := unsupported_reason(config):
        raise UserError(f"--to: {reason}")
    if config.use_differential_attention:
        return "DiffLlama"
    if config.qk_norm:
        return "Qwen3Moe" if config.is_moe else "Qwen3"
    return "Mixtral" if config.is_moe else "Llama"


def unsupported_reason(config: ModelConfig) -> str | None:
    """The function says why no format can hold a model, and returns None where one can."""
    if config.num_shared_experts:
        return (
            "no model of Hugging Face's or llama.cpp's has shared experts beside Mixtral's or "
            f"Qwen3Moe's routed ones; {_CAN_BE_EXPORTED}"
        )
    if config.router_balance == "bias":
        return (
            "Mixtral and Qwen3Moe, the formats of mixtures, have no place for the router biases of "
            "--router-balance bias; train with --router-balance aux to export, or use this model "
            "with hamner.chat and hamner.evaluate"
        )
    if config.is_moe and config.use_differential_attention:
        return (
            "no model of Hugging Face's or llama.cpp's joins differential attention with "
            f"experts; {_CAN_BE_EXPORTED}"
        )
    return None


def hugging_face_config(
    config: ModelConfig, *, dtype: torch.dtype, context: int, eos_ids: list[int]
) -> dict:
    """The function gives the content of config.json.

    Args:
        config: of the model.
        dtype: of the matrices.
        context: tokens the model was trained to use at once.
        eos_ids: tokens that end a text, the tokenizer's own first.

    Raises:
        UserError: transformers has no model of this shape.
    """
    kind = architecture(config)
    # A theta raised by NTK-aware scaling is like any other.
    rope = {"rope_theta": scaled_theta(config)}
    if config.rope_scaling not in ("none", "ntk"):
        scaling = {
            "rope_type": config.rope_scaling,
            "factor": config.rope_scaling_factor,
        }
        if config.rope_scaling == "yarn":
            scaling["original_max_position_embeddings"] = config.rope_scaling_from
        rope = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    values = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": MODEL_TYPES.get(kind, kind.lower()),
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
        # Qwen3's default is 128, and of Mixtral without it transformers cannot compute yarn.
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.expert_intermediate_size,
        "max_position_embeddings": context,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        **rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    return values | _config_of_kind(config, kind)


def _config_of_kind(config: ModelConfig, kind: str) -> dict:
    """The function gives the part of config.json that only this architecture has."""
    values: dict = {}
    if kind == "Llama":
        values["mlp_bias"] = False
    if config.qk_norm:
        values["use_sliding_window"] = False
    if config.is_moe:
        values |= {
            "num_experts_per_tok": config.num_experts_per_token,
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
    if kind == "Qwen3Moe":
        values |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": config.expert_intermediate_size,
            "norm_topk_prob": True,
            "num_experts": config.num_experts,
        }
    if kind == "Mixtral":
        values |= {"num_local_experts": config.num_experts, "sliding_window": None}
    return values


def to_hugging_face(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The function gives a model's parameters Hugging Face's names.

    Args:
        config: of the model.
        weights: every parameter by its name in `hamner.model.transformer.Transformer`.

    Returns:
        Views where the layout allows it. A tied output head is left out, as is usual.

    Raises:
        UserError: transformers has no model of this shape.
    """
    kind = architecture(config)
    q, kv = config.num_attention_heads * config.head_size, config.num_kv_heads * config.head_size
    out = {
        "model.embed_tokens.weight": weights["embed.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = weights["lm_head.weight"]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        packed = weights[f"{ours}.attention.qkv_proj.weight"].split((q, kv, kv))
        for name, part in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
            out[f"{theirs}.self_attn.{name}.weight"] = part
        out[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.attention.o_proj.weight"]
        out[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.attention.norm.weight"]
        out[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.mlp.norm.weight"]
        if kind == "DiffLlama":
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                out[f"{theirs}.self_attn.{name}"] = weights[f"{ours}.attention.{name}"]
        if config.qk_norm:
            for name in ("q_norm.weight", "k_norm.weight"):
                out[f"{theirs}.self_attn.{name}"] = weights[f"{ours}.attention.{name}"]
        if config.is_moe:
            out |= _experts(config, weights, f"{ours}.mlp", theirs)
        else:
            gate, up = weights[f"{ours}.mlp.gate_up_proj.weight"].chunk(2)
            out[f"{theirs}.mlp.gate_proj.weight"] = gate
            out[f"{theirs}.mlp.up_proj.weight"] = up
            out[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.mlp.down_proj.weight"]
    return out


def _experts(
    config: ModelConfig, weights: Mapping[str, Tensor], ours: str, theirs: str
) -> dict[str, Tensor]:
    """The function gives router and experts of the MLP `ours` the names in the layer `theirs`."""
    moe, names = f"{theirs}.block_sparse_moe", ("w1", "w3", "w2")
    if config.qk_norm:
        moe, names = f"{theirs}.mlp", ("gate_proj", "up_proj", "down_proj")
    out = {f"{moe}.gate.weight": weights[f"{ours}.router.weight"]}
    gate_up, down = weights[f"{ours}.gate_up_weight"], weights[f"{ours}.down_weight"]
    for expert in range(config.num_experts):
        parts = *gate_up[expert].chunk(2), down[expert]
        for name, part in zip(names, parts, strict=True):
            out[f"{moe}.experts.{expert}.{name}.weight"] = part
    return out
