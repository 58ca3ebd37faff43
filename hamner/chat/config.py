"""The module has the flags of `python -m hamner.chat`. Torch-free, so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hamner.errors import UserError
from hamner.model.sampling import Sampling


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model. One that was not fine-tuned on conversations completes text instead."""

    sampling: Sampling = field(default_factory=Sampling)
    checkpoint: Path | None = None
    """a run's folder (its best checkpoint, or else its newest) or one of its checkpoints; default
    the run in runs/ that saved last"""
    system: str = ""
    """system prompt"""
    max_new_tokens: int = 512
    """most tokens of an answer"""
    seq_len: int | None = None
    """tokens of context; default the length the model was trained at"""
    seed: int | None = None
    """of the choice of tokens; default another one every time"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to run"""
    serve: int | None = None
    """instead of the terminal, answer OpenAI's chat-completions protocol on this port of this
    machine (0: any free port)"""
    max_requests: int = 8
    """with --serve, most requests at a time: one is answered, the others wait"""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seq_len", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
        if self.serve is not None and not 0 <= self.serve < 2**16:
            raise UserError(f"--serve {self.serve} is no port: use 0 to 65535")
