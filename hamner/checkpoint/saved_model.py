"""The module finds the model of a run and loads it to be used: chat, server, export, evaluation."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.format import MODEL_FILE, OPTIMIZER_FILE, Checkpoint, CheckpointError
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import CONFIG_FILE, TrainConfig, no_run, refuse_export, run_of
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.ops import build_ops
from hamner.model.transformer import Transformer

RUNS = Path("runs")
"""where runs are looked for when none is named"""


@dataclass(frozen=True)
class SavedModel:
    """A saved model is a whole checkpoint with what its run knows about it."""

    config: TrainConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """The name is that of the run's folder."""
        return run_of(self.checkpoint.path).resolve().name

    @property
    def is_chat(self) -> bool:
        """The property says whether the model was fine-tuned on conversations."""
        return self.checkpoint.state().get("stage") == "sft"

    def weights(self) -> dict[str, Tensor]:
        """The method gives tensors by name, on the CPU, in the dtypes they were saved in."""
        return load_file(self.checkpoint.path / MODEL_FILE)

    def build(self, device: torch.device) -> Transformer:
        """The method loads it: bf16 matrices and kernels on a GPU, fp32 and torch on a CPU."""
        on_gpu = device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        shape = self.config.model
        # Decoding has its own attention, on the KV cache; this one is for whole sequences.
        asked = {"seq_len": self.config.seq_len, "micro_batch_size": 1}
        whole = AttentionShape.of_model(shape, device=device, dtype=dtype, **asked)
        attention = get_attention("sdpa", whole)
        with torch.device("meta"):
            model = Transformer(shape, build_ops("triton" if on_gpu else "torch", attention))
        for parameter in model.matrices():
            parameter.data = parameter.data.to(dtype)
        model.to_empty(device=device).requires_grad_(False)
        self.checkpoint.load_model(model.state_dict())
        return model


def find_saved_model(path: Path | None, *, flag: str = "--checkpoint") -> SavedModel:
    """The function finds a model and checks that its files are whole.

    Args:
        path: a run's folder, of which the best checkpoint is taken, or the newest where none was
            looked for; or one of its checkpoints (`step_*`), wherever it was copied to. None is the
            run in runs/ that saved last.
        flag: that named it, for messages.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or its tokenizer is another one now.
    """
    path = path or _newest_run()
    found = _find_checkpoint(path, flag)
    try:
        found.verify(except_for=(OPTIMIZER_FILE,))
    except CheckpointError as error:
        raise UserError(
            f"{flag} {path}: {error}; name an older one of {found.path.parent}"
        ) from error
    run = RunFolder(run_of(found.path))
    config = TrainConfig.read(run.config)
    tokenizer = run.open_tokenizer(config)
    if found.state().get("tokenizer") != tokenizer.fingerprint:
        raise UserError(
            f"{flag} {path}: it was trained with another content of the tokenizer "
            f"{tokenizer.name} than is there now; put the old one back"
        )
    return SavedModel(config, found, tokenizer)


def _find_checkpoint(path: Path, flag: str) -> Checkpoint:
    """The function finds the checkpoint that `path` names, or the run's that it names."""
    refuse_export(path, flag)
    if (path / MODEL_FILE).is_file() and (run_of(path) / CONFIG_FILE).is_file():
        return Checkpoint.at(path)
    if (path / CONFIG_FILE).is_file():
        folder = RunFolder(path).checkpoints
        saved = checkpoint.find(folder)
        if not saved:
            raise UserError(f"{flag} {path}: this run has not saved a checkpoint yet")
        return checkpoint.best(folder) or saved[-1]
    raise no_run(path, flag)


def _newest_run() -> Path:
    saved = [
        (found[-1].path.stat().st_mtime, config.parent)
        for config in RUNS.glob(f"*/{CONFIG_FILE}")
        if (found := checkpoint.find(RunFolder(config.parent).checkpoints))
    ]
    if not saved:
        raise UserError(
            f"--checkpoint: {RUNS}/ holds no run with a checkpoint; name a run's folder"
        )
    return max(saved)[1]
