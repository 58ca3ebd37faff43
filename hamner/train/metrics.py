"""A run measures tokens/s, MFU, memory and how evenly its routers share the work."""

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hamner.config.model import ModelConfig
from hamner.hardware import GIB, Gpu
from hamner.plan.costs import flops_per_token


@dataclass(frozen=True)
class Spike:
    """A spike is a step whose loss was far above those before it."""

    step: int
    tokens: int
    loss: float
    """nats per token"""
    z_score: float
    """robust: see `hamner.train.health.StepHealth.score`"""


@dataclass(frozen=True)
class Record:
    """A record is one line of metrics.jsonl."""

    step: int
    tokens: int
    """trained so far"""
    loss: float
    """cross-entropy, mean over the steps since the last record, skipped ones left out, nats per
    token; NaN if all were skipped"""
    val_loss: float | None
    """the latest evaluation, at `val_step`"""
    val_step: int | None
    lr: float
    grad_norm: float
    """global norm before clipping, of the last step"""
    tokens_per_second: float
    """since the last record; evaluation, sampling and saving not counted"""
    mfu: float | None
    """share of the GPU's dense peak, or None where the peak is unknown"""
    peak_vram_gib: float | None
    """most memory allocated since the start, or None without a GPU"""
    seconds: float
    """of training in all starts together"""
    skipped_steps: int
    """steps without an update because loss or gradient was not finite, all in all"""
    sources: dict[str, dict]
    """by --data SPEC: tokens, documents, epochs, skipped, lost (see `TrainLoader.progress`);
    empty for conversations"""
    router: dict | None = None
    """per layer expert load (shares of the routed assignments) and entropy (nats), means over the
    same steps as the loss, and dropped (assignments that no expert took: none ever); or None"""
    int8: dict | None = None
    """by linear layer and operand, one a layer: relative error of quantisation in the last good
    step, None for an operand that is bf16; or None"""
    spikes: tuple[Spike, ...] = ()
    """steps since the last record whose loss stood out"""

    @property
    def perplexity(self) -> float:
        """The perplexity is exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def to_json(self) -> dict:
        """In metrics.jsonl what is not finite, which JSON cannot say, is null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        for name in ("router", "sources", "int8", "spikes"):
            if not values[name]:
                del values[name]
        return values


class Stopwatch:
    """The watch counts seconds of training, paused for evaluation, sampling and saving."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """until it was last paused"""
        self.started: float | None = None

    def start(self) -> None:
        self.started = time.perf_counter()

    def pause(self) -> None:
        self.seconds = self.read()
        self.started = None

    def read(self) -> float:
        running = 0.0 if self.started is None else time.perf_counter() - self.started
        return self.seconds + running


class Mfu:
    """MFU is model FLOPs utilisation (PaLM, arXiv:2204.02311), by `flops_per_token`'s formula.

    Args:
        model: shape.
        seq_len: tokens per sequence.
        gpu: the table's entry, or None for an unknown GPU or a CPU.
        precision: "bf16" or "fp32".
    """

    def __init__(self, model: ModelConfig, seq_len: int, gpu: Gpu | None, precision: str) -> None:
        self.flops = flops_per_token(model, seq_len)
        self.unhalved = flops_per_token(model, seq_len, causal=False)
        self.gpu, self.precision = gpu, precision
        self.peak = gpu.peak_tflops(precision) * 1e12 if gpu else None

    def __call__(self, tokens_per_second: float) -> float | None:
        """The result is the share of the peak, or None where it is unknown."""
        return tokens_per_second * self.flops / self.peak if self.peak else None

    def explain(self) -> str:
        """The text is the formula with this run's numbers."""
        per_token = (
            f"{self.flops / 1e9:.3f} GFLOP per token (6 x active matmul parameters + 6 L d T, "
            f"causal; {self.unhalved / 1e9:.3f} with the full square)"
        )
        if self.peak is None:
            return f"{per_token}; MFU not shown: the device's peak is unknown"
        return (
            f"MFU = tokens/s x {per_token} / {self.peak / 1e12:.1f} TFLOP/s "
            f"({self.gpu.name}, dense {self.precision})"
        )


def peak_vram_gib(device: torch.device) -> float | None:
    """The result is the most memory PyTorch had allocated on the GPU, GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / GIB


def describe_routers(interval_sum: Tensor, steps: int) -> dict | None:
    """The function gives an interval's means for the metrics (see `Record.router`).

    Args:
        interval_sum: (layers, experts + 1) sums of `StepResult.router`, on the CPU.
        steps: good ones in the interval; without any there is no mean.
    """
    if not steps:
        return None
    means = (interval_sum.double() / steps).tolist()
    load = [layer[:-1] for layer in means]
    return {
        "load": load,
        "entropy": [layer[-1] for layer in means],
        # Load is counted from what each expert was handed, so what is missing was dropped;
        # beyond six digits there is only fp32's rounding.
        "dropped": [abs(round(1.0 - sum(layer), 6)) for layer in load],
    }
