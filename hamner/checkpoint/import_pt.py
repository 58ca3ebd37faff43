"""`python -m hamner.checkpoint import` makes a run of a `.pt` checkpoint of the earlier trainer.

What it holds: `config`, a dict of the model's shape; `model_state_dict`, whose keys may carry the
prefix `_orig_mod.` of a compiled model; `step` and `tokens_total`. Keys and their places here:

    embed_tokens.weight, final_norm.weight, lm_head.weight      embed, norm, lm_head
    layers.N.attn_norm.weight, layers.N.mlp_norm.weight         attention.norm, mlp.norm
    layers.N.attention.{q,k,v}_proj.weight                      attention.qkv_proj, packed
    layers.N.attention.o_proj.weight                            attention.o_proj
    layers.N.mlp.mlp.{gate,up}_proj.weight                      mlp.gate_up_proj, packed
    layers.N.mlp.mlp.down_proj.weight                           mlp.down_proj
    layers.N.mlp.router.weight                                  mlp.router
    layers.N.mlp.experts.E.{gate,up,down}_proj.weight           mlp.gate_up_weight, down_weight
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hamner.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImportConfig:
    """Turn a .pt checkpoint of the earlier trainer into a run: to chat, fine-tune, evaluate and
    export. Only tensors and plain values are read from it, nothing is unpickled."""

    file: Annotated[Path, tyro.conf.Positional]
    """the .pt checkpoint"""
    run_dir: Path
    """folder of the run to make; must not exist"""
    tokenizer: str
    """the one the model was trained with: builtin, a tokenizer.json, or a Hugging Face name
    owner/name"""


@dataclass(frozen=True)
class Imported:
    """The result says what `import_checkpoint` made."""

    checkpoint: Path
    model: ModelConfig
    step: int
    tokens: int
    can_chat: bool
    """whether the tokenizer has the tokens that conversations need"""


def import_checkpoint(config: ImportConfig) -> Imported:
    """The function reads the file and writes the run.

    Raises:
        UserError: not such a checkpoint, a model that Hamner has no place for, or another
            tokenizer; nothing is written then.
    """
    from hamner.data.tokenizer import load_tokenizer

    if config.run_dir.exists():
        raise UserError(f"--run-dir {config.run_dir} exists already: name another folder")
    content = _read(config.file)
    model = _model_config(config.file, content["config"])
    weights = convert(config.file, model, content["model_state_dict"])
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"--tokenizer {config.tokenizer} has {tokenizer.vocab_size:,} entries, the model of "
            f"{config.file} {model.vocab_size:,}: name the tokenizer it was trained with"
        )
    for_chat = add_chat_tokens(tokenizer)
    step, tokens = (int(content.get(name, 0)) for name in ("step", "tokens_total"))
    try:
        path = _write_run(
            config, model, weights, tokenizer=for_chat or tokenizer, step=step, tokens=tokens
        )
    except OSError as error:
        shutil.rmtree(config.run_dir, ignore_errors=True)
        raise UserError(
            f"--run-dir {config.run_dir} cannot be written: {error.strerror}"
        ) from error
    return Imported(
        checkpoint=path, model=model, step=step, tokens=tokens, can_chat=for_chat is not None
    )


def _write_run(
    config: ImportConfig,
    model: ModelConfig,
    weights: dict[str, "Tensor"],
    *,
    tokenizer: "Tokenizer",
    step: int,
    tokens: int,
) -> Path:
    """The function writes the run's folder and returns its checkpoint."""
    import torch

    import hamner
    from hamner.checkpoint import format as checkpoint
    from hamner.checkpoint.run_folder import RunFolder
    from hamner.config.train import TrainConfig

    run = RunFolder(config.run_dir)
    tokenizer_file = (run.path / "tokenizer.json").resolve()
    run.start(
        TrainConfig(
            model=model,
            option=next((o.option for o in OPTIONS.values() if o.model == model), "current"),
            run_dir=run.path,
            seq_len=model.max_seq_len,
            tokenizer=str(tokenizer_file),
        )
    )
    tokenizer.save(tokenizer_file)
    run.checkpoints.mkdir(exist_ok=True)
    saved = checkpoint.save(
        run.checkpoints,
        step,
        model=weights,
        # The other trainer's moments belong to parameters that are packed differently.
        optimizer={},
        state={
            "step": step,
            "tokens": tokens,
            "model": dataclasses.asdict(model),
            "tokenizer": tokenizer.fingerprint,
            "imported_from": config.file.name,
            "versions": {"hamner": hamner.__version__, "torch": torch.__version__},
        },
    )
    return saved.path


def convert(
    file: Path, config: ModelConfig, state_dict: Mapping[str, "Tensor"]
) -> dict[str, "Tensor"]:
    """The function gives the earlier trainer's parameters our names and packing, in fp32.

    Args:
        file: in messages.
        config: of the model.
        state_dict: with or without the prefix `_orig_mod.`.

    Raises:
        UserError: a tensor is missing, has another shape or has no place.
    """
    theirs = {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}
    d, vocab_size = config.hidden_size, config.vocab_size

    def take(name: str, *shape: int) -> "Tensor":
        tensor = theirs.pop(name, None)
        if tensor is None:
            raise UserError(f"{file}: its model has no {name}, which its config asks for")
        if tensor.shape != shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, its config asks for {shape}"
            )
        return tensor.float()

    ours = {
        "embed.weight": take("embed_tokens.weight", vocab_size, d),
        "norm.weight": take("final_norm.weight", d),
    }
    if not config.tie_word_embeddings:
        ours["lm_head.weight"] = take("lm_head.weight", vocab_size, d)
    else:
        # The embedding, once more.
        theirs.pop("lm_head.weight", None)
    for number in range(config.num_layers):
        ours |= _convert_layer(f"layers.{number}", config, take)
    if theirs:
        raise UserError(f"{file}: its model has {sorted(theirs)[0]}, which has no place in ours")
    return ours


def _convert_layer(
    layer: str, config: ModelConfig, take: Callable[..., "Tensor"]
) -> dict[str, "Tensor"]:
    """The function converts one layer.

    Args:
        layer: its name, which is the same in both.
        config: of the model.
        take: gives the earlier trainer's tensor of a name and shape.
    """
    import torch

    d, kv = config.hidden_size, config.num_kv_heads * config.head_size
    attention, mlp = f"{layer}.attention", f"{layer}.mlp"

    def swiglu(prefix: str) -> tuple["Tensor", "Tensor"]:
        """The function packs gate_up (2I, D), gate first, and down (D, I)."""
        width = config.expert_intermediate_size
        gate, up = (take(f"{prefix}.{part}_proj.weight", width, d) for part in ("gate", "up"))
        return torch.cat((gate, up)), take(f"{prefix}.down_proj.weight", d, width)

    q = take(f"{attention}.q_proj.weight", d, d)
    k, v = (take(f"{attention}.{part}_proj.weight", kv, d) for part in "kv")
    ours = {
        f"{attention}.norm.weight": take(f"{layer}.attn_norm.weight", d),
        f"{attention}.qkv_proj.weight": torch.cat((q, k, v)),
        f"{attention}.o_proj.weight": take(f"{attention}.o_proj.weight", d, d),
        f"{mlp}.norm.weight": take(f"{layer}.mlp_norm.weight", d),
    }
    if config.is_moe:
        experts = [swiglu(f"{mlp}.experts.{e}") for e in range(config.num_experts)]
        ours[f"{mlp}.router.weight"] = take(f"{mlp}.router.weight", config.num_experts, d)
        ours[f"{mlp}.gate_up_weight"] = torch.stack([gate_up for gate_up, _ in experts])
        ours[f"{mlp}.down_weight"] = torch.stack([down for _, down in experts])
    else:
        ours[f"{mlp}.gate_up_proj.weight"], ours[f"{mlp}.down_proj.weight"] = swiglu(f"{mlp}.mlp")
    return ours


def add_chat_tokens(tokenizer: "Tokenizer") -> "Tokenizer | None":
    """The function adds the tokens that conversations need, or returns None without room for them.

    A tokenizer of another kind often reserves special tokens that no text contains. The last of
    them are given the names of ours: the vocabulary, and so the model, keeps its size.
    """
    from hamner.data.tokenizer import SPECIAL_TOKENS, Tokenizer

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
    import pickle

    import torch

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


def parse(args: Sequence[str]) -> ImportConfig:
    """The function reads the command line."""
    return tyro.cli(ImportConfig, args=args, prog="python -m hamner.checkpoint import")


def main(args: Sequence[str]) -> int:
    """The command imports as its flags say and returns 0."""
    config = parse(args)
    imported = import_checkpoint(config)
    print(
        f"imported {imported.model.num_parameters():,} parameters of step {imported.step:,} "
        f"({imported.tokens:,} tokens) into {imported.checkpoint}"
    )
    if not imported.can_chat:
        print(
            f"--tokenizer {config.tokenizer} has no room for the tokens of conversations: the "
            "model can complete text, but not be fine-tuned to chat"
        )
    return 0
