"""Runs on disk with a model of the tests' choice, without training one."""

from pathlib import Path

import torch

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.model import ModelConfig
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import load_tokenizer
from tests.models import build


def sharp(config: ModelConfig):
    """A model whose greedy text varies: its blocks outweigh the embedding they add to."""
    model = build(config)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(10.0)
    return model


def save_run(
    folder: Path,
    model,
    *,
    step: int = 7,
    chat: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: str = "builtin",
    seq_len: int | None = None,
) -> Path:
    """A run's folder with `model` as its checkpoint, trained on its whole context unless said
    otherwise; returns the folder."""
    config = TrainConfig(
        model=model.config,
        option="tiny",
        run_dir=folder,
        seq_len=seq_len or model.config.max_seq_len,
        tokenizer=tokenizer,
    )
    run = RunFolder(folder)
    if not run.config.exists():
        run.start(config, load_tokenizer(tokenizer, model.config.vocab_size))
        run.owner.release()
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    checkpoint.save(
        checkpoints,
        step,
        model={
            name: tensor.to(dtype) if name in matrices else tensor
            for name, tensor in model.state_dict().items()
        },
        optimizer={},
        run_files=(run.config, run.tokenizer),
        state={
            "step": step,
            "tokenizer": load_tokenizer(tokenizer, model.config.vocab_size).fingerprint,
            "stage": "sft" if chat else "pretrain",
        },
    )
    return folder
