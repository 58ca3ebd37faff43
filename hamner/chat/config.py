"""The module has the flags of `python -m hamner.chat`. Torch-free, so that `--help` is quick."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hamner.config.model import flag
from hamner.errors import UserError
from hamner.model.sampling import Sampling

HOST = "127.0.0.1"


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model. One that was not fine-tuned on conversations completes text instead."""

    sampling: Sampling = field(default_factory=Sampling)
    checkpoint: Path | None = None
    """a run's folder (its best checkpoint, or else its newest) or one of its checkpoints; default
    the run in runs/ that saved last"""
    system: str | None = None
    """system prompt; default the one that the model's conversations used most, "" is none"""
    max_new_tokens: int = 512
    """longest answer, in tokens"""
    seq_len: int | None = None
    """tokens of context; default the length the model was trained at"""
    seed: int | None = None
    """of the choice of tokens; default another one every time"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to run"""
    serve: int | None = None
    """instead of the terminal, serve a chat page and OpenAI's protocol for chats and completions on
    this port (0: any free port)"""
    host: str = HOST
    """with --serve, address to answer at; default this machine only; with 0.0.0.0 others reach it
    too, without a password"""
    max_requests: int = 8
    """with --serve, requests at a time, at most: one is answered, the others wait"""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "seq_len", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{flag(name)} {value} must be above 0")
        if self.serve is not None and not 0 <= self.serve < 2**16:
            raise UserError(f"--serve {self.serve} is no port: use 0 to 65535")
        for name in ("host", "max_requests") if self.serve is None else ():
            if (value := getattr(self, name)) != getattr(ChatConfig, name):
                raise UserError(f"--{flag(name)} {value} needs --serve PORT beside it")
        if not self.host:
            raise UserError("--host is empty: name an address, such as 0.0.0.0 for every one")

    @property
    def is_local(self) -> bool:
        """The property says whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_any_address(self) -> bool:
        """The property says whether `host` stands for every address of this machine, and so is none
        to open in a browser."""
        return self.host in ("0.0.0.0", "::")
