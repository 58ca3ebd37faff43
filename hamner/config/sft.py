"""A fine-tuning run is configured by the flags of `hamner.sft`."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import tyro

from hamner.config.model import ModelConfig
from hamner.config.train import (
    ComputeConfig,
    FineTuning,
    RunConfig,
    TrainConfig,
    run_of,
)
from hamner.errors import UserError

SEQ_LEN = 1024
"""positions of a row, where the model was made for so many"""


@dataclass(frozen=True)
class SftConfig:
    """Fine-tune a pre-trained model into a chatbot.

    Conversations are packed into rows without seeing each other; learned are the assistant's words
    and the token that ends them. Model, tokenizer and option are those of --checkpoint.
    """

    # Not flags: of the checkpoint.
    model: tyro.conf.Fixed[ModelConfig]
    option: tyro.conf.Fixed[str] = "a"
    tokenizer: tyro.conf.Fixed[str] = "builtin"
    text_tags: tyro.conf.Fixed[bool] = False

    sft: FineTuning = field(default_factory=FineTuning)
    data: tuple[str, ...] = ("builtin",)
    """SPEC[=WEIGHT] ...: builtin (a short set for trying out); a file, folder or glob of .jsonl or
    .parquet; a .json file; hf:owner/name[:config[:split]]; in the usual forms, {"messages"},
    ShareGPT's {"conversations"}, prompt and completion, Alpaca's, {"text": "<|user|>..."}. WEIGHT
    is how often an epoch goes through it, 1 without"""
    run_dir: Path | None = None
    """folder of the run; default that of --checkpoint with -sft"""
    steps: int | None = None
    """length of the run in optimizer steps; default as --epochs"""
    bad_rows: float = 0.1
    """share of a source's rows that may be no conversation; they are left out and listed. With
    more, nothing is trained"""
    batch_size: int = 8
    """rows per optimizer step"""
    seq_len: int = SEQ_LEN
    """positions of a row, and the longest conversation; beyond what the model was made for, it is
    extended"""
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
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.training()

    def training(self) -> TrainConfig:
        """The method gives what the training loop trains, as long as `steps` says.

        Raises:
            UserError: The values make no sense, alone or together.
        """
        own = {name: value for name, value in vars(self).items() if name not in ("compute", "run")}
        own |= {"model": self._extended_model(), "document_mask": True, "sample_every": 0}
        return TrainConfig(**own, **vars(self.compute), **vars(self.run))

    def _extended_model(self) -> ModelConfig:
        """The method gives the checkpoint's model, made as long as asked."""
        scaling, trained = self.sft.rope_scaling, self.sft.trained_seq_len
        # A run's own resume has the model that it made.
        is_own = (self.model.rope_scaling, self.model.rope_scaling_from) == (scaling, trained)
        if self.model.rope_scaling != "none" and not is_own:
            self._require_no_other_stretch()
            return self.model
        if scaling == "none":
            return replace(self.model, max_seq_len=max(self.model.max_seq_len, self.seq_len))
        if self.seq_len <= trained:
            raise UserError(
                f"--rope-scaling {scaling} needs a --seq-len above the "
                f"{trained} the model was trained with, not {self.seq_len}"
            )
        return replace(
            self.model, max_seq_len=self.seq_len, rope_scaling=scaling, rope_scaling_from=trained
        )

    def _require_no_other_stretch(self) -> None:
        """A second stretch would not begin from the first, but from the positions before it."""
        longest = self.model.max_seq_len
        for name, value, is_given in (
            ("rope-scaling", self.sft.rope_scaling, self.sft.rope_scaling != "none"),
            ("seq-len", self.seq_len, self.seq_len > longest),
        ):
            if is_given:
                raise UserError(
                    f"--{name} {value}: the model's positions were stretched to {longest:,} before "
                    f"and cannot be again: use --seq-len up to {longest}, or fine-tune the model "
                    "that it was made from"
                )

    @classmethod
    def for_checkpoint(cls, path: Path) -> "SftConfig":
        """The method gives the defaults for fine-tuning a run or one of its checkpoints.

        Raises:
            UserError: `path` is neither.
        """
        base, run = TrainConfig.of_run(path, "--checkpoint"), run_of(path)
        named = run if run.name not in ("", "..") else run.resolve()
        return cls(
            model=base.model,
            option=base.option,
            tokenizer=base.tokenizer,
            text_tags=base.text_tags,
            sft=FineTuning(checkpoint=path, trained_seq_len=base.seq_len),
            seq_len=min(SEQ_LEN, base.model.max_seq_len),
            run_dir=named.with_name(f"{named.name}-sft"),
        )

    @classmethod
    def read(cls, path: Path) -> "SftConfig":
        """The method reads a fine-tuning run's config.json, as the defaults of its resume.

        Raises:
            UserError: The file is not readable, not a configuration of this version, or of a run
                that pre-trains.
        """
        saved = TrainConfig.read(path)
        if saved.sft is None:
            raise UserError(
                f"--resume: {path.parent} is a pre-training run; continue it with "
                f"python -m hamner.train --resume --run-dir {path.parent}"
            )
        parts = {"compute": part(ComputeConfig, saved), "run": part(RunConfig, saved)}
        own = {f.name: getattr(saved, f.name) for f in fields(cls) if f.name not in parts}
        return cls(**own, **parts)


def part(cls: type, config: TrainConfig):
    """The function takes one part out of a configuration."""
    return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})
