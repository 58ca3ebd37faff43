"""`python -m hamner.checkpoint import` makes a run of a `.pt` checkpoint of the earlier trainer.

What it holds: `config`, a dict of the model's shape; `model_state_dict`, whose keys may carry the
prefix `_orig_mod.` of a compiled model; `step` and `tokens_total`. `convert` says what each of its
keys becomes here.
"""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import hamner
from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import SavedModel
from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from hamner.errors import UserError


def import_checkpoint(file: Path, run_dir: Path, tokenizer_name: str) -> SavedModel:
    """The function makes the run `run_dir` of the checkpoint `file`.

    Raises:
        UserError: not such a checkpoint, a model that Hamner cannot hold, or another tokenizer;
            nothing is written then.
    """
    if run_dir.exists():
        raise UserError(f"--run-dir {run_dir} exists already: name another folder")
    content = _read(file)
    model = _model_config(file, content["config"])
    weights = convert(file, model, content["model_state_dict"])
    tokenizer = load_tokenizer(tokenizer_name)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer_name} has {tokenizer.vocab_size:,} entries, the model of "
            f"{file} {model.vocab_size:,}: name the tokenizer it was trained with"
        )
    tokenizer = add_chat_tokens(tokenizer) or tokenizer
    config = TrainConfig(
        model=model,
        option=next((o.option for o in OPTIONS.values() if o.model == model), "current"),
        run_dir=run_dir,
        seq_len=model.max_seq_len,
        tokenizer=str((run_dir / "tokenizer.json").resolve()),
    )
    state = {
        "step": int(content.get("step", 0)),
        "tokens": int(content.get("tokens_total", 0)),
        "model": dataclasses.asdict(model),
        "tokenizer": tokenizer.fingerprint,
        "imported_from": file.name,
        "versions": {"hamner": hamner.__version__, "torch": torch.__version__},
    }
    run = RunFolder(run_dir)
    run.start(config, tokenizer)
    try:
        # The other trainer's moments belong to parameters that are packed differently.
        saved = checkpoint.save(
            run.checkpoints, state["step"], model=weights, optimizer={}, state=state
        )
    except OSError as error:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise UserError(f"--run-dir {run_dir} cannot be written: {error.strerror}") from error
    return SavedModel(config, saved, tokenizer)


def convert(file: Path, config: ModelConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The function gives the earlier trainer's parameters our names and packing, in fp32.

    Raises:
        UserError: a tensor is missing, has another shape or no counterpart.
    """
    theirs = {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}
    shapes = _shapes(config)

    def take(*modules: str) -> Tensor:
        """The function packs the weights of the earlier trainer's modules into one."""
        weights = []
        for name in (f"{module}.weight" for module in modules):
            tensor, shape = theirs.pop(name, None), shapes[name.split(".")[-2]]
            if tensor is None:
                raise UserError(f"{file}: its model has no {name}, which its config asks for")
            if tensor.shape != shape:
                raise UserError(
                    f"{file}: {name} has shape {tuple(tensor.shape)}, its config asks for {shape}"
                )
            weights.append(tensor.float())
        return torch.cat(weights)

    ours = {"embed.weight": take("embed_tokens"), "norm.weight": take("final_norm")}
    if not config.tie_word_embeddings:
        ours["lm_head.weight"] = take("lm_head")
    else:
        # The embedding, once more.
        theirs.pop("lm_head.weight", None)
    for layer in (f"layers.{number}" for number in range(config.num_layers)):
        attention, mlp = f"{layer}.attention", f"{layer}.mlp"
        ours[f"{attention}.norm.weight"] = take(f"{layer}.attn_norm")
        ours[f"{attention}.qkv_proj.weight"] = take(*(f"{attention}.{p}_proj" for p in "qkv"))
        ours[f"{attention}.o_proj.weight"] = take(f"{attention}.o_proj")
        ours[f"{mlp}.norm.weight"] = take(f"{layer}.mlp_norm")
        if config.is_moe:
            experts = [f"{mlp}.experts.{e}" for e in range(config.num_experts)]
            gate_up = [take(f"{e}.gate_proj", f"{e}.up_proj") for e in experts]
            ours[f"{mlp}.router.weight"] = take(f"{mlp}.router")
            ours[f"{mlp}.gate_up_weight"] = torch.stack(gate_up)
            ours[f"{mlp}.down_weight"] = torch.stack([take(f"{e}.down_proj") for e in experts])
        else:
            ours[f"{mlp}.gate_up_proj.weight"] = take(f"{mlp}.mlp.gate_proj", f"{mlp}.mlp.up_proj")
            ours[f"{mlp}.down_proj.weight"] = take(f"{mlp}.mlp.down_proj")
    if theirs:
        raise UserError(f"{file}: its model has {sorted(theirs)[0]}, which has no place in ours")
    return ours


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The function gives the shape of the earlier trainer's weights by the name of their module."""
    d, kv = config.hidden_size, config.num_kv_heads * config.head_size
    width = config.expert_intermediate_size
    return {
        **dict.fromkeys(("embed_tokens", "lm_head"), (config.vocab_size, d)),
        **dict.fromkeys(("attn_norm", "mlp_norm", "final_norm"), (d,)),
        **dict.fromkeys(("q_proj", "o_proj"), (d, d)),
        **dict.fromkeys(("k_proj", "v_proj"), (kv, d)),
        **dict.fromkeys(("gate_proj", "up_proj"), (width, d)),
        "down_proj": (d, width),
        "router": (config.num_experts, d),
    }


def add_chat_tokens(tokenizer: Tokenizer) -> Tokenizer | None:
    """The function adds the tokens that conversations need, or returns None without room for them.

    A tokenizer of another kind often reserves special tokens that no text contains. The last of
    them are given the names of ours: the vocabulary, and so the model, keeps its size.
    """
    definition = tokenizer.definition
    added = {token["content"]: token for token in definition.get("added_tokens", [])}
    wanted = [name for name in SPECIAL_TOKENS[1:] if name not in added]
    free = [
        token["content"]
        for token in added.values()
        if token["special"] and token["content"] not in SPECIAL_TOKENS
        if token["id"] != tokenizer.eot_id
    ]
    if len(free) < len(wanted):
        return None
    # Not the first: those are the ones that other programs know, such as padding and unknown.
    names = dict(zip(free[len(free) - len(wanted) :], wanted, strict=True))
    vocab = {names.get(token, token): i for token, i in definition["model"]["vocab"].items()}
    renamed = definition | {
        "added_tokens": [
            token | {"content": names.get(token["content"], token["content"])}
            for token in definition["added_tokens"]
        ],
        "model": definition["model"] | {"vocab": vocab},
    }
    return Tokenizer(json.dumps(renamed), "with chat tokens")


def _read(file: Path) -> dict:
    """The function reads the checkpoint; tensors stay on disk until they are used."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{file} is not a checkpoint of tensors and plain values, or is damaged; nothing else "
            "in it is loaded, because unpickling can run any program"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), dict) for name in ("config", "model_state_dict")
    ):
        raise UserError(
            f"{file} is no checkpoint of the earlier trainer: it needs the two dicts "
            "config and model_state_dict"
        )
    return content


def _model_config(file: Path, config: Mapping) -> ModelConfig:
    """The function gives the shape of the model in our terms."""
    if config.get("use_differential_attention"):
        raise UserError(
            f"{file}: its differential attention (twice the query heads, a norm with weights) is "
            "another one than Hamner's, and cannot be imported"
        )
    if config.get("architecture", "transformer") != "transformer":
        raise UserError(f"{file}: only transformers can be imported, not {config['architecture']}")
    names = {
        *("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "num_kv_heads"),
        *("expert_intermediate_size", "max_seq_len", "rope_theta", "rms_norm_eps"),
        "tie_word_embeddings",
    }
    missing = sorted(names - set(config))
    if missing:
        raise UserError(f"{file}: its config has no {missing[0]}")
    values = {name: config[name] for name in names}
    values["rope_theta"] = float(values["rope_theta"])
    # There, one expert meant a dense model.
    if config.get("num_experts", 1) > 1:
        values["num_experts"] = config["num_experts"]
        values["num_experts_per_token"] = config.get("num_active_experts", 2)
    try:
        return ModelConfig(**values)
    except (UserError, TypeError) as error:
        raise UserError(f"{file}: its config does not describe a model ({error})") from error
