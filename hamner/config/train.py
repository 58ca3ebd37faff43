"""A run's configuration is the flags of `hamner.train`, and the config.json of every run."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hamner.cli import NameOrPath
from hamner.config.model import ModelConfig, flag
from hamner.config.recipe import RecipeConfig
from hamner.config.serialization import build
from hamner.errors import UserError
from hamner.files import parse_json

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
"""of a run, and copied into each of its checkpoints"""
CHECKPOINTS = "checkpoints"
"""the folder of a run's checkpoints, in the run's"""

Matmul = Literal["bf16", "int8", "int8-all"]
"""arithmetic of linear layers"""

COUNTS = (
    *("batch_size", "seq_len", "steps", "tokens", "micro_batch_size", "stop_after"),
    *("eval_tokens", "ddp_bucket_mib"),
)
"""flags that must be 1 or more, where they are given"""
POSITIVE = ("lr", "vram_budget", "embedding_lr", "vector_lr", "decay_fraction")
"""flags that must be above 0, where they are given"""
NOT_NEGATIVE = (
    *("min_lr", "warmup_steps", "weight_decay", "grad_clip", "keep", "seed", "patience"),
    *("embedding_weight_decay", "beta1", "beta2", "momentum", "val_fraction", "bad_rows"),
    *("hang_minutes", "log_every", "eval_every", "save_every", "sample_every", "keep_every"),
)
"""flags that must be 0 or more, where they are given"""
HANG_MINUTES = (1e-3, 1e6)
"""the shortest and the longest time that a hang takes to be seen"""
MAX_STEP_TOKENS = 2**28
"""of a batch, which is in memory as a whole"""
BELOW_ONE = ("beta1", "beta2", "momentum", "val_fraction")
"""of those, flags that must be below 1"""


def run_of(path: Path) -> Path:
    """The function gives the run's folder that `path` is, or is a checkpoint in.

    A checkpoint that was copied elsewhere has its own config.json and is its own run here.
    """
    for checkpoint in (path, path.resolve()):
        run = checkpoint.parent.parent
        if checkpoint.parent.name == CHECKPOINTS and (run / CONFIG_FILE).is_file():
            return run
    return path


def no_run(path: Path, flag: str) -> UserError:
    """The error is that the path which `flag` names is neither a run's folder nor a checkpoint."""
    mend = ""
    if path.is_file() and path.suffix != ".gguf":
        mend = "; python -m hamner.checkpoint import makes a run of a .pt file"
    return UserError(
        f"{flag} {path} is neither a run's folder nor one of its checkpoints (step_*){mend}"
    )


def refuse_export(path: Path, flag: str) -> None:
    """The function refuses a folder that transformers reads, which has no state of a run.

    Raises:
        UserError: It begins with the flag that named the folder.
    """
    try:
        values = parse_json((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(values, dict) and "model_type" in values:
        raise UserError(
            f"{flag} {path} is a model in Hugging Face's format, not a run: name the run that it "
            "was exported from, or one of its checkpoints"
        )


def require_finite(config: Any) -> None:
    """The function refuses numbers that are infinite or not a number.

    Raises:
        UserError: It names the flag.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{flag(name)} {value} must be a finite number")


def require_sequence(eval_tokens: int, seq_len: int) -> None:
    """The function refuses an evaluation on text of less than a sequence, which is of nothing.

    Raises:
        UserError: It names both flags.
    """
    if eval_tokens < seq_len:
        raise UserError(
            f"--eval-tokens {eval_tokens} is less than one sequence of --seq-len {seq_len}, so "
            f"nothing would be evaluated: make it {seq_len} or more"
        )


@dataclass(frozen=True)
class TaskConfig:
    """These flags say what is trained, on what and for how long, and when that is evaluated."""

    model: ModelConfig
    option: str = "a"
    """model, batch and schedule to start from; every other flag overrides a part of it"""
    data: tuple[str, ...] = ("builtin",)
    """SPEC[=WEIGHT] ...: builtin; a file, folder or glob of .txt, .jsonl, .parquet;
    hf:owner/name[:config[:split]]; shards:DIR. Weights are shares of the tokens"""
    run_dir: Path | None = None
    """folder of the run; default runs/OPTION"""
    steps: int | None = None
    """length of the run in optimizer steps; default as --tokens"""
    tokens: float | None = None
    """length of the run in tokens (10e9 is ten billion); default the option's"""
    batch_size: int = 24
    """sequences per optimizer step"""
    seq_len: int = 1024
    """tokens per sequence"""
    document_mask: bool = False
    """keep the documents of a sequence from attending to each other"""
    eval_every: int = 500
    """steps between evaluations on the validation split; 0 is never"""
    sample_every: int = 1_000
    """steps between samples; 0 is never"""
    patience: int = 0
    """evaluations without a better validation loss after which the run stops, its best checkpoint
    kept; 0 trains to the end"""
    tokenizer: NameOrPath = "builtin"
    """builtin, a tokenizer.json, or a Hugging Face name owner/name"""
    val_fraction: float = 0.01
    """share of the documents held out for validation, chosen by their hash"""
    bad_rows: float = 0.001
    """share of a source's rows that may hold no document and are passed over; more stop the run"""


@dataclass(frozen=True)
class ComputeConfig:
    """These flags say how a step is computed: its memory, precision, kernels and processes."""

    micro_batch_size: int | None = None
    """sequences per forward and backward pass; default the most that fits --vram-budget"""
    recompute: str = "auto"
    """auto, none, selective, full, or full:N (N layers full, the rest selective)"""
    vram_budget: float | None = None
    """memory to stay within, GiB; default what the device has, less a reserve"""
    kernels: Literal["auto", "triton", "torch", "liger"] = "auto"
    """implementations of the fused operations; auto is triton on a GPU, torch on a CPU"""
    attention: Literal["auto", "triton", "flash-attn", "sdpa"] = "auto"
    """attention backend; auto is the fastest measured on this GPU"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """compute precision; auto is bf16 with fp32 masters on a GPU, fp32 on a CPU"""
    matmul: Matmul = "bf16"
    """arithmetic of the linear layers, on a GPU of compute capability 8.0 or more: int8 multiplies
    int8 matrices forward and for the gradients of activations, int8-all for those of weights too"""
    compile: bool = False
    """run the model through torch.compile"""
    cuda_graph: bool = True
    """replay forward and backward as one CUDA graph where that is possible; with several processes
    where each has one micro-batch a step"""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """with several processes (torchrun): ddp, the whole model on every GPU; fsdp, sharded over the
    GPUs of a machine; auto is ddp where the model fits"""
    ddp_bucket_mib: int = 25
    """with ddp: MiB of gradients that are sent together, while backward computes the next ones"""
    fsdp_reshard: bool = True
    """with fsdp: free a block's gathered weights after its forward pass and gather them again for
    backward; without, they stay, which takes memory and saves communication"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to train"""


@dataclass(frozen=True)
class RunConfig:
    """These flags say how a run goes: its regularization and seed, its log and its checkpoints."""

    resume: bool = False
    """continue the run in --run-dir from its newest checkpoint, with its own flags"""
    weight_decay: float = 0.1
    """decoupled weight decay, on matrices only"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 does not clip"""
    seed: int = 0
    """of weights, data order and samples"""
    log_every: int = 10
    """steps between log lines and metrics; 0 is never"""
    save_every: int = 1_000
    """steps between checkpoints, beside the last one; 0 is never"""
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
    eval_tokens: int = 200_000
    """most validation tokens an evaluation reads"""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """also send the metrics there, when installed"""


@dataclass(frozen=True)
class StartConfig:
    """These flags say what a pre-training run starts from."""

    init_from: Path | None = None
    """start a new run from the weights of this run or checkpoint, with a fresh optimizer, schedule
    and data; option, model and tokenizer are its by default"""
    reserve_chat_tokens: bool = False
    """give the tokens of conversations (<|user|> ...) unused ids of a --tokenizer that lacks them,
    as hamner.sft needs them"""


@dataclass(frozen=True)
class FineTuning:
    """These flags say which model is fine-tuned, for how long and for which context."""

    checkpoint: Path | None = None
    """the run to fine-tune, or one of its checkpoints"""
    epochs: float = 3.0
    """length of the run in passes over the conversations"""
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """stretch RoPE's positions from the length trained before to --seq-len"""
    trained_seq_len: tyro.conf.Fixed[int] = 1024
    """sequence length of the model's training before"""
    system: tyro.conf.Fixed[str] = ""
    """system prompt that the conversations used most, with which a chat begins; none: empty"""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"--epochs {self.epochs} must be above 0")
        require_finite(self)


@dataclass(frozen=True)
class TrainConfig(StartConfig, RunConfig, ComputeConfig, RecipeConfig, TaskConfig):
    """Pre-train a language model, from scratch or with `--init-from` from another run's weights.

    Defaults are those of the option: `--option b --help` shows b's.
    """

    sft: Annotated[FineTuning | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """what makes it a fine-tuning run; None: it pre-trains"""
    text_tags: Annotated[bool, tyro.conf.Fixed, tyro.conf.Suppress] = False
    """whether conversations have their tags in ordinary text, as the model's trainer before did"""

    def __post_init__(self) -> None:
        require_finite(self)
        self._require_ranges()
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
        if self.tokens_per_step > MAX_STEP_TOKENS:
            raise UserError(
                f"--batch-size {self.batch_size} with --seq-len {self.seq_len} makes "
                f"{self.tokens_per_step:,} tokens a step; it must be at most {MAX_STEP_TOKENS:,}"
            )
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if not self.data:
            raise UserError("--data needs at least one SPEC")

    def _require_ranges(self) -> None:
        """Numbers outside the ranges above are refused."""
        ranges = (
            (COUNTS, lambda value: value >= 1, "must be above 0"),
            (POSITIVE, lambda value: value > 0, "must be above 0"),
            (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
            (BELOW_ONE, lambda value: value < 1, "must be below 1"),
            (("decay_fraction", "bad_rows"), lambda value: value <= 1, "must be at most 1"),
        )
        for names, allows, sentence in ranges:
            for name in names:
                value = getattr(self, name)
                if value is not None and not allows(value):
                    raise UserError(f"--{flag(name)} {value} {sentence}")
        shortest, longest = HANG_MINUTES
        if self.hang_minutes and not shortest <= self.hang_minutes <= longest:
            raise UserError(
                f"--hang-minutes {self.hang_minutes} must be between {shortest:g} and "
                f"{longest:,.0f}, or 0 for never"
            )

    @property
    def group_lrs(self) -> dict[str, float]:
        """Each group of parameters (see `RecipeConfig`) has this peak learning rate."""
        return {
            "hidden": self.lr,
            "embedding": self.lr if self.embedding_lr is None else self.embedding_lr,
            "vector": self.lr if self.vector_lr is None else self.vector_lr,
        }

    @property
    def group_decays(self) -> dict[str, float]:
        """Each group of parameters has this weight decay."""
        own = self.embedding_weight_decay
        return {
            "hidden": self.weight_decay,
            "embedding": self.weight_decay if own is None else own,
            "vector": 0.0,
        }

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def folder(self) -> Path:
        return self.run_dir if self.run_dir is not None else Path("runs") / self.option

    def to_json(self) -> dict[str, Any]:
        """The method gives plain values, as in config.json: parts as objects, paths as strings."""
        values = asdict(
            self,
            dict_factory=lambda items: {n: str(v) if isinstance(v, Path) else v for n, v in items},
        )
        values["run_dir"] = str(self.folder)
        if self.sft is None:
            del values["sft"]
        return values

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """The method reads a run's config.json.

        Raises:
            UserError: The file is not readable, or not a configuration of this version.
        """
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a run's configuration: {error}") from error
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise UserError(f"{path} is not a run's configuration")
        return build(cls, values, path)

    @classmethod
    def of_run(cls, path: Path, flag: str) -> "TrainConfig":
        """The method reads the configuration of the run that `flag` names by `path`, its folder or
        one of its checkpoints.

        Raises:
            UserError: `path` is neither.
        """
        run = run_of(path)
        if not (run / CONFIG_FILE).is_file():
            raise no_run(path, flag)
        refuse_export(run, flag)
        return cls.read(run / CONFIG_FILE)
