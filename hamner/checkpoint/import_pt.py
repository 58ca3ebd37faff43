"""`python -m hamner.checkpoint import` makes a run of a `.pt` checkpoint of the earlier trainer.

What it holds: `config`, a dict of the model's shape; `model_state_dict`, whose keys may carry the
prefix `_orig_mod.` of a compiled model; `step`, `tokens_total` and `training_type`. `convert` says
what each of its keys becomes here.

The earlier trainer's chat models, and base models pre-trained on dialogues, read the tags of
conversations as its tokenizer spells them. Where that has no such tokens, the tags stay ordinary
text here too; see `hamner.data.chat_template`.
"""

import dataclasses
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.filesize import decimal
from torch import Tensor

import hamner
from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.pt_file import read_pt
from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import SavedModel
from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.config.serialization import build
from hamner.config.train import TOKENIZER_FILE, TrainConfig
from hamner.data.chat_template import ROLE_TOKENS
from hamner.data.chat_tokens import add_chat_tokens, missing_chat_tokens
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.errors import UserError
from hamner.progress import SILENT, Status, Task

CHAT_TYPES = {"sft", "dpo"}
"""words of a chat model's `training_type`"""
DIALOGUE_TYPES = {"chat"}
"""words of the `training_type` of a base model that has read conversations"""
ARCHITECTURES = ("transformer", "emotional")
"""one model by two names: the second has other learning rates for its middle layers"""
MAX_COUNT = 10**15
"""more steps or tokens than anyone has trained"""


def import_checkpoint(
    file: Path, run_dir: Path, tokenizer_name: str, status: Status = SILENT
) -> SavedModel:
    """The function makes the run `run_dir` of the checkpoint `file`; `status` shows how far it is.

    Raises:
        UserError: not such a checkpoint, a damaged one, a model that Hamner cannot hold, or another
            tokenizer; nothing is written then.
    """
    if run_dir.exists():
        raise UserError(f"--run-dir {run_dir} exists already: name another folder")
    content = _read(file, status)
    model = _model_config(file, content["config"])
    state_dict = content["model_state_dict"]
    with status.task("converting", len(state_dict), "tensors") as task:
        weights = convert(file, model, state_dict, task)
    tokenizer = load_tokenizer(tokenizer_name)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer_name} has {tokenizer.vocab_size:,} entries, the model of "
            f"{file} {model.vocab_size:,}: name the tokenizer it was trained with"
        )
    kind = _training_type(file, content)
    words = set(re.split("[^a-z0-9]+", kind.lower()))
    if words & (CHAT_TYPES | DIALOGUE_TYPES) and _lacks_tags(tokenizer):
        tokenizer = tokenizer.with_text_tags()
    else:
        tokenizer = add_chat_tokens(tokenizer, model.vocab_size) or tokenizer
    config = TrainConfig(
        model=model,
        option=next((o.option for o in OPTIONS.values() if o.model == model), "current"),
        run_dir=run_dir,
        seq_len=model.max_seq_len,
        tokenizer=str((run_dir / TOKENIZER_FILE).resolve()),
        text_tags=tokenizer.text_tags,
    )
    state = {
        "step": _count(file, content, "step"),
        "tokens": _count(file, content, "tokens_total"),
        "stage": "sft" if words & CHAT_TYPES else "pretrain",
        "model": dataclasses.asdict(model),
        "tokenizer": tokenizer.fingerprint,
        "imported_from": file.name,
        "training_type": kind,
        "versions": {"hamner": hamner.__version__, "torch": torch.__version__},
    }
    size = decimal(sum(tensor.nbytes for tensor in weights.values()))
    with status.task(f"writing {run_dir} ({size})"):
        return _write(config, state, weights, tokenizer)


def _write(
    config: TrainConfig, state: dict, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> SavedModel:
    """The run's folder is whole, or not there.

    Raises:
        UserError: it cannot be written, or another process came first.
    """
    run = RunFolder(config.folder)
    try:
        run.start(config, tokenizer)
        # The other trainer's moments belong to parameters that are packed differently.
        saved = checkpoint.save(
            run.checkpoints,
            state["step"],
            model=weights,
            optimizer={},
            state=state,
            run_files=(run.config, run.tokenizer),
        )
    except BaseException as error:
        if run.owner.is_owner:
            shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"--run-dir {run.path} cannot be written: {error.strerror}") from error
        raise
    finally:
        run.owner.release()
    return SavedModel(config, saved, tokenizer)


def describe(saved: SavedModel) -> str:
    """The sentence says what an import took the model for."""
    kind = saved.checkpoint.state()["training_type"]
    kind = f"training_type {kind}" if kind else "no training_type"
    tags = " ".join(ROLE_TOKENS.values())
    what = f"a chat model ({kind})" if saved.is_chat else f"a base model ({kind})"
    if saved.tokenizer.text_tags:
        has = "has" if saved.is_chat else "has read conversations that have"
        return (
            f"taken for {what} that {has} the tags {tags} in ordinary text, and keeps them so in "
            "chat, fine-tuning and export"
        )
    if missing_chat_tokens(saved.tokenizer):
        return (
            f"taken for {what} whose tokenizer has no room for the tokens of conversations {tags}, "
            "so that it can complete text, but not be fine-tuned to chat"
        )
    return f"taken for {what} with the tags {tags} as tokens of their own"


def _lacks_tags(tokenizer: Tokenizer) -> bool:
    """The answer is whether the tokenizer spells every tag in ordinary text."""
    return set(ROLE_TOKENS.values()) <= set(missing_chat_tokens(tokenizer))


def convert(
    file: Path, config: ModelConfig, state_dict: Mapping[str, Tensor], task: Task
) -> dict[str, Tensor]:
    """The function gives the earlier trainer's parameters our names and packing, in fp32.

    The task counts the tensors.

    Raises:
        UserError: a tensor is missing, has another shape, no counterpart, or values that are not
            finite.
    """
    theirs = {str(name).replace("_orig_mod.", ""): value for name, value in state_dict.items()}
    shapes = _shapes(config)

    def take(*modules: str) -> Tensor:
        """The function packs the weights of the earlier trainer's modules into one."""
        weights = []
        for name in (f"{module}.weight" for module in modules):
            tensor, shape = theirs.pop(name, None), shapes[name.split(".")[-2]]
            weights.append(_weight(file, name, tensor, shape))
            task.advance()
        return torch.cat(weights)

    ours = {"embed.weight": take("embed_tokens"), "norm.weight": take("final_norm")}
    if not config.tie_word_embeddings:
        ours["lm_head.weight"] = take("lm_head")
    else:
        head = theirs.pop("lm_head.weight", None)
        if head is not None and not _is_equal(head, ours["embed.weight"]):
            raise UserError(
                f"{file}: its lm_head.weight is not its embedding, which its config says it is"
            )
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


def _weight(file: Path, name: str, tensor: object, shape: tuple[int, ...]) -> Tensor:
    """The function gives a tensor in fp32.

    Raises:
        UserError: it is missing, of another shape or type, or not finite.
    """
    if tensor is None:
        raise UserError(f"{file}: its model has no {name}, which its config asks for")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise UserError(f"{file}: {name} is not a tensor of weights")
    if tensor.shape != shape:
        raise UserError(
            f"{file}: {name} has shape {tuple(tensor.shape)}, its config asks for {shape}"
        )
    if not tensor.is_floating_point():
        raise UserError(f"{file}: {name} has the type {tensor.dtype}, not a floating-point one")
    weight = tensor.float()
    if not (finite := weight.isfinite()).all():
        raise UserError(
            f"{file}: {name} has {int((~finite).sum()):,} values that are not finite: the model "
            "diverged before it was saved, or the file is damaged; import an older checkpoint"
        )
    return weight


def _is_equal(head: object, embedding: Tensor) -> bool:
    return (
        isinstance(head, Tensor)
        and head.shape == embedding.shape
        and torch.equal(head.float(), embedding)
    )


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


def _read(file: Path, status: Status) -> dict:
    """The function reads the checkpoint and checks that it has the parts of one."""
    content = read_pt(file, status)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), dict) for name in ("config", "model_state_dict")
    ):
        raise UserError(
            f"{file} is no checkpoint of the earlier trainer: it needs the two dicts "
            "config and model_state_dict"
        )
    return content


def _count(file: Path, content: Mapping, name: str) -> int:
    """The function gives a count of the checkpoint, 0 if it has none.

    Raises:
        UserError: it is not a count.
    """
    value = content.get(name, 0)
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise UserError(f"{file}: its {name} is {value!r}, not a count")
    return value


def _training_type(file: Path, content: Mapping) -> str:
    value = content.get("training_type", "")
    if not isinstance(value, str):
        raise UserError(f"{file}: its training_type is {value!r}, not a word such as pretrain")
    return value


def _model_config(file: Path, config: Mapping) -> ModelConfig:
    """The function gives the shape of the model in our terms."""
    for name, value in config.items():
        is_plain = isinstance(value, bool | int | str | None)
        if not is_plain and not (isinstance(value, float) and math.isfinite(value)):
            raise UserError(f"{file}: its config has the unfit value {value!r} for {name}")
    if config.get("use_differential_attention"):
        raise UserError(
            f"{file}: its differential attention (twice the query heads, a norm with weights) is "
            "another one than Hamner's, and cannot be imported"
        )
    architecture = config.get("architecture", ARCHITECTURES[0])
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file}: only transformers can be imported, not {architecture}")
    names = {
        *("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "num_kv_heads"),
        *("expert_intermediate_size", "max_seq_len", "rope_theta", "rms_norm_eps"),
        "tie_word_embeddings",
    }
    missing = sorted(names - set(config))
    if missing:
        raise UserError(f"{file}: its config has no {missing[0]}")
    values = {name: config[name] for name in names}
    # There, one expert meant a dense model.
    if config.get("num_experts", 1) not in (0, 1):
        values["num_experts"] = config["num_experts"]
        values["num_experts_per_token"] = config.get("num_active_experts", 2)
    try:
        return build(ModelConfig, values, Path("config"))
    except UserError as error:
        raise UserError(f"{file}: its config does not describe a model: {error}") from error
