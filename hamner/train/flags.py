"""The flags of a start have the defaults of its option, or of the run that it goes on with.

Torch-free, so that `--help` is quick.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hamner.config.model import ModelConfig, flag
from hamner.config.options import find_option, for_option
from hamner.config.recipe import Recipe
from hamner.config.train import CONFIG_FILE, TrainConfig, require_sequence
from hamner.errors import UserError

READ_WITH: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("momentum", "optimizer", lambda optimizer: optimizer == "muon", "add --optimizer muon"),
    ("decay_fraction", "decay", lambda decay: decay == "wsd", "add --decay wsd"),
    (
        *("rope_scaling_from", "rope_scaling", lambda scaling: scaling != "none"),
        "add --rope-scaling linear, ntk or yarn",
    ),
    ("router_aux_loss_coef", "num_experts", bool, "make --num-experts 2 or more"),
    ("router_z_loss_coef", "num_experts", bool, "make --num-experts 2 or more"),
    (
        *("router_aux_loss_coef", "router_balance", lambda balance: balance == "aux"),
        "make it --router-balance aux",
    ),
    (
        *("router_bias_update_speed", "router_balance", lambda balance: balance == "bias"),
        "add --router-balance bias",
    ),
    (
        *("gradient_checkpointing", "recompute", lambda recompute: recompute in ("auto", "none")),
        "make it --recompute none",
    ),
    ("ddp_bucket_mib", "parallel", lambda kind: kind != "fsdp", "make it --parallel ddp"),
    ("fsdp_reshard", "parallel", lambda kind: kind != "ddp", "make it --parallel fsdp"),
    ("keep_every", "keep", bool, "make --keep 1 or more"),
    ("patience", "eval_every", bool, "make --eval-every 1 or more"),
    ("patience", "val_fraction", bool, "make --val-fraction above 0"),
    ("eval_every", "val_fraction", bool, "make --val-fraction above 0"),
    ("init_from", "replay", lambda replay: replay is None, "do without --replay"),
    ("resume", "replay", lambda replay: replay is None, "do without --replay"),
)
"""a flag, another one, with which of its values the first one is read, and the mend for the rest"""


@dataclass(frozen=True)
class Origin:
    """These flags of `TrainConfig` decide what the others are by default."""

    option: str | None = None
    recipe: Recipe = TrainConfig.recipe
    run_dir: Path | None = TrainConfig.run_dir
    resume: bool = TrainConfig.resume
    replay: Path | None = TrainConfig.replay
    init_from: Path | None = TrainConfig.init_from
    steps: int | None = TrainConfig.steps
    tokens: float | None = TrainConfig.tokens
    use_differential_attention: bool = ModelConfig.use_differential_attention

    @property
    def folder(self) -> Path:
        """The folder is the run's, which may not be there yet."""
        if self.run_dir is not None:
            return self.run_dir
        return find_option(self.option or TrainConfig.option).folder

    @property
    def has_run(self) -> bool:
        """The answer is whether there is a run to resume."""
        return self.resume and (self.folder / CONFIG_FILE).is_file()

    def defaults(self) -> TrainConfig:
        """The method gives the configuration of a start without any other flag.

        Raises:
            UserError: there is no such option, or what should go on cannot be read.
        """
        if self.replay is not None:
            if not self.replay.is_file():
                raise UserError(
                    f"--replay {self.replay}: no such file; RUN/bad_steps/ has those of a run"
                )
            run = self.replay.resolve().parent.parent  # of RUN/bad_steps/FILE
            if not (run / CONFIG_FILE).is_file():
                raise UserError(
                    f"--replay {self.replay} is in no run: name a file of a RUN/bad_steps/"
                )
            return _read_run(run)
        if not self.has_run:
            default = self._from_weights() if self.init_from else self._fresh()
            return replace(default, resume=self.resume)
        run = _read_run(self.folder)
        if run.sft is not None:
            raise UserError(
                f"--resume: {self.folder} is a fine-tuning run; continue it with "
                f"python -m hamner.sft --resume --run-dir {self.folder}"
            )
        if (self.steps, self.tokens) != (None, None):
            # Either of them takes the place of what the run was started with.
            run = replace(run, steps=None, tokens=None)
        return replace(run, resume=True, stop_after=None, allow_data_change=False)

    def _fresh(self) -> TrainConfig:
        """The method gives the defaults of a run from random weights."""
        default = for_option(self.option or TrainConfig.option, self.recipe)
        if self.use_differential_attention:
            # No model has both, and the recipe was not asked for qk-norm.
            default = replace(default, model=replace(default.model, qk_norm=False))
        return default

    def _from_weights(self) -> TrainConfig:
        """The method gives the defaults of a run from the weights of another run or checkpoint.

        Raises:
            UserError: `init_from` is neither.
        """
        base = TrainConfig.of_run(self.init_from, "--init-from")
        default = for_option(self.option or base.option, self.recipe)
        model = base.model
        if self.option:
            # The weights are there: what the recipe would have changed of them is as it is.
            model = replace(default.model, qk_norm=base.model.qk_norm)
        return replace(
            default,
            model=model,
            tokenizer=base.tokenizer,
            text_tags=base.text_tags,
            seq_len=min(default.seq_len, model.max_seq_len),
        )


def require_consistent(config: TrainConfig, default: TrainConfig, origin: Origin) -> None:
    """The function refuses flags that contradict each other or the run that is to go on.

    Args:
        config: what the command line gave.
        default: what it is without any flag but those of `origin`.

    Raises:
        UserError: it names them.
    """
    for name in ("option", "recipe"):
        given, saved = getattr(config, name), getattr(default, name)
        if given != saved:
            raise UserError(
                f"--{name} {given} is not the {saved} that {default.folder} was started with; "
                "leave the flag out, or start another run with --run-dir FOLDER"
            )
    refuse_without_effect(config, default)
    lengths = [(each.eval_tokens, each.seq_len) for each in (config, default)]
    evaluates = config.eval_every and config.val_fraction
    if evaluates and lengths[0] != lengths[1]:
        require_sequence(config.eval_tokens, config.seq_len)
    if origin.has_run and config.init_from != default.init_from:
        raise UserError(
            f"--init-from {config.init_from} starts a new run, and --resume goes on with one that "
            f"started from {default.init_from or 'random weights'}: leave one of the two out"
        )


def refuse_without_effect(config: TrainConfig, default: TrainConfig) -> None:
    """The function refuses a flag that does nothing beside the value of another one.

    A flag that has its default does not count, and neither does the number 0, which asks for
    nothing either. Bounds such as --eval-tokens hold as well where nothing comes near them.

    Raises:
        UserError: it names both flags.
    """
    values, defaults = (vars(each.model) | vars(each) for each in (config, default))
    for name, other, is_read, mend in READ_WITH:
        value = values[name]
        asks = value is False or value != 0
        if asks and value != defaults[name] and not is_read(values[other]):
            raise UserError(
                f"{_spelled(name, value)} does nothing with {_spelled(other, values[other])}: "
                f"leave it out, or {mend}"
            )


def _spelled(name: str, value: Any) -> str:
    """The function writes a flag with its value as on a command line."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{flag(name)}"
    return f"--{flag(name)} {value}"


def _read_run(folder: Path) -> TrainConfig:
    """The function reads a run's configuration; the run may have been moved."""
    config = replace(TrainConfig.read(folder / CONFIG_FILE), run_dir=folder)
    find_option(config.option)
    return config
