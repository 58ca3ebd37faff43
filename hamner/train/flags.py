"""The flags of a start have the defaults of its option, or of the run that it goes on with.

Torch-free, so that `--help` is quick.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from hamner.config.model import ModelConfig
from hamner.config.options import find_option, for_option
from hamner.config.recipe import Recipe
from hamner.config.train import CONFIG_FILE, TrainConfig
from hamner.errors import UserError


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
            # RUN/bad_steps/FILE
            return _read_run(self.replay.parent.parent)
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


def _read_run(folder: Path) -> TrainConfig:
    """The function reads a run's configuration; the run may have been moved."""
    config = replace(TrainConfig.read(folder / CONFIG_FILE), run_dir=folder)
    find_option(config.option)
    return config
