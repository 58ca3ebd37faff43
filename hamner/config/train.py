"""Everything a training run is told: the flags of `hamner.train`, and its config.json.

Torch-free, so that `--help` and every refusal come at once.
"""

import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hamner.config.model import ModelConfig, flag
from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.files import read_json

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train a language model from scratch.

    Defaults are those of the option: `--option b --help` shows b's.
    """

    command: ClassVar[str] = "hamner.train"
    stage: ClassVar[str] = "pretrain"
    """what a checkpoint's state calls this kind of training"""

    model: ModelConfig
    option: str = "a"
    """model, batch and schedule to start from; every other flag overrides a part of it"""
    data: tuple[str, ...] = ("builtin",)
    """SPEC[=WEIGHT] ...: builtin; a file, folder or glob of .txt, .jsonl, .parquet;
    hf:owner/name[:config[:split]]; shards:DIR. Weights are shares of the tokens"""
    run_dir: Path | None = None
    """folder of the run; default runs/OPTION"""
    resume: bool = False
    """continue the run in --run-dir from its newest checkpoint, with its own flags"""
    steps: int | None = None
    """length of the run in optimizer steps; default as --tokens"""
    tokens: float | None = None
    """length of the run in tokens (10e9 is ten billion); default the option's"""
    batch_size: int = 24
    """sequences per optimizer step"""
    micro_batch_size: int | None = None
    """sequences per forward and backward pass; default the most that fits --vram-budget"""
    seq_len: int = 1024
    """tokens per sequence"""
    lr: float = 2e-4
    """peak learning rate"""
    min_lr: float = 2e-5
    """learning rate at the end of the cosine"""
    warmup_steps: int = 2_000
    """steps of linear warm-up"""
    weight_decay: float = 0.1
    """decoupled weight decay, on matrices only"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 does not clip"""
    seed: int = 0
    """of weights, data order and samples"""
    recompute: str = "auto"
    """auto, none, selective, full, or full:N (N layers full, the rest selective)"""
    vram_budget: float | None = None
    """memory to stay within, GiB; default what the device has, less a reserve"""
    kernels: Literal["auto", "triton", "torch", "liger"] = "auto"
    """implementations of the fused operations; auto is triton on a GPU, torch on a CPU"""
    attention: Literal["auto", "triton", "flash-attn", "sdpa"] = "auto"
    """attention backend; auto is the fastest measured on this GPU"""
    document_mask: bool = False
    """keep the documents of a sequence from attending to each other"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """compute precision; auto is bf16 with fp32 masters on a GPU, fp32 on a CPU"""
    compile: bool = False
    """run the model through torch.compile"""
    cuda_graph: bool = True
    """replay forward and backward as one CUDA graph where that is possible; with several processes
    where each has one micro-batch a step"""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """with several processes (torchrun): ddp, the whole model on every GPU; fsdp, its state divided
    over the GPUs of a machine; auto is ddp where the model fits"""
    ddp_bucket_mib: int = 25
    """with ddp: MiB of gradients that are sent together, while backward computes the next ones"""
    fsdp_reshard: bool = True
    """with fsdp: free a block's gathered weights after its forward pass and gather them again for
    backward; without, they stay, which takes memory and saves messages"""
    log_every: int = 10
    """steps between log lines and metrics; 0 is never"""
    eval_every: int = 500
    """steps between evaluations on the validation split; 0 is never"""
    save_every: int = 1_000
    """steps between checkpoints, beside the last one; 0 is never"""
    sample_every: int = 1_000
    """steps between samples; 0 is never"""
    patience: int = 0
    """evaluations without a better validation loss after which the run stops, its best checkpoint
    kept; 0 trains to the end"""
    keep: int = 3
    """newest checkpoints kept; 0 keeps all"""
    keep_every: int = 0
    """the first checkpoint at or after each multiple of so many steps is kept too; 0 is none"""
    hang_minutes: float = 30.0
    """minutes without a finished step, after which all stacks are written down and what can be is
    saved, or with several processes the job is ended; 0 is never"""
    allow_data_change: bool = False
    """with --resume: go on with other --data, --seed or --val-fraction, read from their start"""
    replay: Path | None = None
    """run the batch of a bad step (RUN/bad_steps/*.safetensors) again, say where the first value
    that is not finite comes from, and leave"""
    stop_after: int | None = None
    """save and leave after this many steps of this start"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to train"""
    tokenizer: str = "builtin"
    """builtin, a tokenizer.json, or a Hugging Face name owner/name"""
    val_fraction: float = 0.01
    """share of the documents held out for validation, chosen by their hash"""
    eval_tokens: int = 200_000
    """most validation tokens an evaluation reads"""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """also send the metrics there, when installed"""

    def __post_init__(self) -> None:
        if self.option not in OPTIONS:
            raise UserError(f"--option {self.option} is not one of {', '.join(OPTIONS)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{flag(name)} {value} must be a finite number")
        positive = {
            "batch_size": 1,
            "seq_len": 1,
            "lr": 0,
            "steps": 1,
            "tokens": 1,
            "micro_batch_size": 1,
            "stop_after": 1,
            "eval_tokens": 1,
            "ddp_bucket_mib": 1,
            "vram_budget": 0,
        }
        for name, least in positive.items():
            value = getattr(self, name)
            if value is not None and (value < least or value <= 0):
                raise UserError(f"--{flag(name)} {value} must be above 0")
        not_negative = ("min_lr", "warmup_steps", "weight_decay", "grad_clip", "keep", "seed")
        not_negative += ("patience", "hang_minutes")
        rhythm = ("log_every", "eval_every", "save_every", "sample_every", "keep_every")
        for name in (*not_negative, *rhythm):
            if getattr(self, name) < 0:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must not be negative")
        if self.steps is not None and self.tokens is not None:
            raise UserError("--steps and --tokens both set the length of the run: give one of them")
        if self.seq_len > self.model.max_seq_len:
            raise UserError(
                f"--seq-len {self.seq_len} is longer than --max-seq-len {self.model.max_seq_len}"
            )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size}"
            )
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction} must be at least 0 and below 1")
        if not self.data:
            raise UserError("--data needs at least one SPEC")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.seq_len

    @property
    def total_tokens(self) -> int:
        """Length of the run in tokens, whole steps."""
        if self.steps is not None:
            return self.steps * self.tokens_per_step
        tokens = self.tokens if self.tokens is not None else OPTIONS[self.option].tokens
        return max(1, int(tokens) // self.tokens_per_step) * self.tokens_per_step

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.option

    @classmethod
    def for_option(cls, name: str) -> "TrainConfig":
        """The defaults of an option.

        Raises:
            UserError: no such option.
        """
        if name not in OPTIONS:
            raise UserError(f"--option {name} is not one of {', '.join(OPTIONS)}")
        option = OPTIONS[name]
        return cls(
            model=option.model,
            option=name,
            batch_size=option.batch_size,
            seq_len=option.seq_len,
            lr=option.lr,
            min_lr=option.min_lr,
            warmup_steps=option.warmup_steps,
            eval_every=option.eval_every,
            save_every=option.save_every,
            sample_every=option.sample_every,
            eval_tokens=option.eval_tokens,
            val_fraction=option.val_fraction,
        )

    def to_json(self) -> dict:
        """Plain values, as in config.json."""
        values = dataclasses.asdict(self)
        values["run_dir"] = str(self.folder)
        return values

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """Read a run's config.json.

        Raises:
            UserError: not readable, or not a config of this version.
        """
        values = read_json(path)
        if not isinstance(values.get("model"), dict):
            raise UserError(f"{path} is not a run's configuration")
        model = _build(ModelConfig, values.pop("model"), path)
        # What fine-tuning adds is for hamner.sft alone: elsewhere its runs are runs like any other.
        own = values.pop("sft", {})
        if cls.stage == "sft":
            values |= own
        return _build(cls, {**values, "model": model}, path)


def _build(cls: type, values: dict, path: Path):
    """An instance of a dataclass from JSON values, each checked against its field's type."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{path} has a field this version does not know: {unknown[0]}")
    converted = {name: _convert(value, hints[name], name, path) for name, value in values.items()}
    try:
        return cls(**converted)
    except TypeError as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from error


def _convert(value, hint, name: str, path: Path):
    """`value` as the type `hint`, or a UserError naming the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), name, path)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, args[0], name, path) for item in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{path}: field {name} has an unfit value {value!r}")
