"""Everything a fine-tuning run is told: the flags of `hamner.sft`, and its config.json.

Torch-free, so that `--help` and every refusal come at once.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from hamner.config.model import ModelConfig
from hamner.config.train import CONFIG_FILE, TrainConfig
from hamner.errors import UserError

SEQ_LEN = 1024
"""positions of a row, where the model was made for so many"""


@dataclass(frozen=True)
class SftConfig(TrainConfig):
    """Fine-tune a pre-trained model into a chatbot.

    Conversations are packed into rows without seeing each other; learned are the assistant's words
    and the token that ends them. Model, tokenizer and option are those of --checkpoint.
    """

    command: ClassVar[str] = "hamner.sft"
    stage: ClassVar[str] = "sft"

    # Not flags: of the checkpoint, or without a meaning here.
    model: tyro.conf.Fixed[ModelConfig]
    option: tyro.conf.Fixed[str] = "a"
    tokenizer: tyro.conf.Fixed[str] = "builtin"
    tokens: tyro.conf.Fixed[float | None] = None
    document_mask: tyro.conf.Fixed[bool] = True
    sample_every: tyro.conf.Fixed[int] = 0
    trained_seq_len: tyro.conf.Fixed[int] = SEQ_LEN
    """sequence length of the model's training before"""

    checkpoint: Path | None = None
    """the run to fine-tune, or one of its checkpoints"""
    data: tuple[str, ...] = ("builtin",)
    """SPEC[=WEIGHT] ...: builtin (a short set for trying out); a file, folder or glob of .jsonl
    with {"messages"}, ShareGPT's {"conversations"} or {"text": "<|user|>..."}. WEIGHT is how often
    an epoch goes through it, 1 without"""
    run_dir: Path | None = None
    """folder of the run; default that of --checkpoint with -sft"""
    epochs: float = 3.0
    """length of the run in passes over the conversations"""
    steps: int | None = None
    """length of the run in optimizer steps; default as --epochs"""
    batch_size: int = 8
    """rows per optimizer step"""
    seq_len: int = SEQ_LEN
    """positions of a row, and the longest conversation; beyond what the model was made for, it is
    extended"""
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """stretch RoPE's positions from the length trained before to --seq-len"""
    lr: float = 1e-5
    """peak learning rate"""
    min_lr: float = 1e-6
    """learning rate at the end of the cosine"""
    warmup_steps: int = 20
    """steps of linear warm-up, at most a tenth of the run"""
    eval_every: int = 100
    """steps between evaluations on held-out conversations, at most an epoch; 0 is never"""
    patience: int = 4
    """evaluations without a better validation loss after which the run stops, its best checkpoint
    kept; 0 trains to the end"""
    val_fraction: float = 0.05
    """share of the conversations held out for validation, chosen by their hash"""

    OWN_FIELDS: ClassVar[tuple[str, ...]] = (
        "checkpoint",
        "epochs",
        "rope_scaling",
        "trained_seq_len",
    )

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"--epochs {self.epochs} must be above 0")
        # The one field that follows from others: the checkpoint's model, made as long as asked.
        object.__setattr__(self, "model", self._extended_model())
        super().__post_init__()

    def _extended_model(self) -> ModelConfig:
        if self.rope_scaling == "none":
            return replace(self.model, max_seq_len=max(self.model.max_seq_len, self.seq_len))
        if self.seq_len <= self.trained_seq_len:
            raise UserError(
                f"--rope-scaling {self.rope_scaling} needs a --seq-len above the "
                f"{self.trained_seq_len} the model was trained with, not {self.seq_len}"
            )
        return replace(
            self.model,
            max_seq_len=self.seq_len,
            rope_scaling=self.rope_scaling,
            rope_scaling_from=self.trained_seq_len,
        )

    @classmethod
    def for_checkpoint(cls, path: Path) -> "SftConfig":
        """The defaults for fine-tuning a run or one of its checkpoints.

        Raises:
            UserError: `path` is neither.
        """
        run = path if (path / CONFIG_FILE).is_file() else path.parent.parent
        if not (run / CONFIG_FILE).is_file():
            raise UserError(
                f"--checkpoint {path} is neither a run's folder nor one of its checkpoints (step_*)"
            )
        base = TrainConfig.read(run / CONFIG_FILE)
        return cls(
            model=base.model,
            option=base.option,
            tokenizer=base.tokenizer,
            trained_seq_len=base.seq_len,
            seq_len=min(SEQ_LEN, base.model.max_seq_len),
            checkpoint=path,
            run_dir=run.with_name(f"{run.name}-sft"),
        )

    def to_json(self) -> dict:
        """Plain values, as in config.json: those of a run, and fine-tuning's own under "sft"."""
        values = super().to_json()
        values["sft"] = {name: values.pop(name) for name in self.OWN_FIELDS}
        values["sft"]["checkpoint"] = str(self.checkpoint)
        return values
