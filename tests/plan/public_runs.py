"""Steps of another trainer that others timed on a real RTX 3090 hold the speed model to that card.

languini.csv has the GPT models of languini-kitchen (Stanic et al. 2023, arXiv:2309.11197), copied
from its languini/projects/gpt/throughput_results.csv: Copyright 2023 The Languini Authors, Apache
License 2.0. Of the RTX 3090 all rows with a batch of at least 4 (smaller ones wait for the host),
of two other cards the largest batch of each size. torch 2.0, fp16 autocast, means of 14 steps.

`python -m tests.plan.public_runs` fits the 3090's efficiencies to some sizes and prints what comes
out, with the table of profiles/plan.md.
"""

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.hardware import GPUS
from hamner.plan import costs
from hamner.plan.costs import Cost
from hamner.plan.efficiency import EFFICIENCIES, Efficiency
from hamner.plan.memory import NONE, Policy
from hamner.plan.step_time import MicroBatch, Op, StepPrediction, predict
from tests.plan.measured_runs import ScoreProducts

FP16, FP32 = costs.BF16, costs.FP32
SEQ_LEN = 512
SIZES = ("mini", "tiny", "small", "medium", "large")
SEED = 0
"""draws the sizes that are fitted"""
WAIT = 2.64e-3
"""seconds: GradScaler has the host wait for the gradients before it launches the update, and the
GPU then waits for the host; fitted with the efficiencies"""
FITTED_SIZES = frozenset(random.Random(SEED).sample(SIZES, 3))


class Languini(MicroBatch):
    """A GPT-2 runs under torch.compile and fp16 autocast, its weights, residual and Adam in fp32.

    Bytes are counted as Inductor fuses the model: what is pointwise goes into the reduction before
    or behind it, every matmul reads and writes fp16, and what a head's matmul reads is copied into
    its order first. The loss and Adam run in eager mode, one kernel an operation.
    """

    is_graphed = False
    attention_width = 0
    """0: the model's"""

    @property
    def heads_width(self) -> int:
        return self.attention_width or self.model.hidden_size

    @property
    def parameters(self) -> int:
        """Weights, biases and LayerNorms of the blocks, both embeddings, the head."""
        d, mlp = self.model.hidden_size, self.model.expert_intermediate_size
        block = 4 * d * self.heads_width + 2 * d * mlp + 3 * self.heads_width + mlp + 6 * d
        embeddings = (2 * self.model.vocab_size + self.seq_len + 2) * d
        return self.model.num_layers * block + embeddings

    def block_matmuls(self, product: str = "forward") -> list[Op]:
        d, mlp = self.model.hidden_size, self.model.expert_intermediate_size
        return [
            *3 * [self.matmul(d, self.heads_width)],
            *(self.matmul(self.heads_width, d), self.matmul(d, mlp), self.matmul(mlp, d)),
        ]

    def attention(self, *, backward: bool) -> list[Op]:
        """The whole square is computed, and its fp32 softmax is kept.

        Forward the fp16 scores are written, read by the softmax, which is written in fp32 and in
        fp16, and the latter read. Backward the fp32 softmax is read twice, once to make the fp16
        one again, which is written and read; the gradient of both is written and read, the scores'
        one by two matmuls.
        """
        scores = self.tokens * self.model.num_attention_heads * self.seq_len
        matmuls = 4 if backward else 2
        heads = FP16 * self.tokens * self.heads_width
        flops = matmuls * 2 * self.tokens * self.seq_len * self.heads_width
        by_matmuls = matmuls * 2 * heads + scores * FP16 * (4 if backward else 2)
        by_softmax = scores * ((2 * FP32 + 3 * FP16) if backward else (FP32 + 2 * FP16))
        return [
            ScoreProducts("attention_products", Cost(flops, by_matmuls), launches=matmuls),
            Op("attention", Cost(bytes=by_softmax), launches=2 if backward else 1),
            # q, k, v and the output, or their gradients, are copied into another order.
            Op("attention", Cost(bytes=4 * 2 * heads), launches=4),
        ]

    def norms(self, *, backward: bool) -> Op:
        """Two LayerNorms add to the fp32 residual; q, k and v each send a gradient to the first.

        Backward the gradients of weight and bias take a second pass over the same.
        """
        elements = 2 * self.tokens * self.model.hidden_size
        if backward:
            into = 2 * FP16 + FP32
            return Op("norm", Cost(bytes=elements * (2 * into + 2 * FP32 + FP16)), launches=4)
        return Op("norm", Cost(bytes=elements * (2 * FP32 + 2 * FP16)), launches=2)

    def pointwise(self, *, backward: bool) -> list[Op]:
        """GELU, and the sums of gradients over tokens that are those of the biases."""
        d, mlp = self.model.hidden_size, self.model.expert_intermediate_size
        gelu = FP16 * self.tokens * mlp * (3 if backward else 2)
        biases = FP16 * self.tokens * (3 * self.heads_width + d + mlp + d) * backward
        return [Op("swiglu", Cost(bytes=gelu)), Op("norm", Cost(bytes=biases), 6 * backward)]

    def forward(self) -> list[Op]:
        return [
            self.norms(backward=False),
            *self.attention(backward=False),
            *self.pointwise(backward=False),
            *self.block_matmuls(),
        ]

    def backward(self, policy: Policy) -> list[Op]:
        return [
            self.norms(backward=True),
            *self.attention(backward=True),
            *self.pointwise(backward=True),
            *2 * self.block_matmuls(),
        ]

    def loss(self) -> list[Op]:
        """All logits go to fp32, through log_softmax, and their gradient the same way back."""
        d, vocab_size = self.model.hidden_size, self.model.vocab_size
        logits = self.tokens * vocab_size * ((FP16 + FP32) + 2 * FP32 + 4 * FP32 + (FP32 + FP16))
        embeddings = self.tokens * d * 6 * FP32
        return [
            *3 * [self.matmul(d, vocab_size)],
            Op("loss", Cost(bytes=logits + embeddings), launches=14),
        ]

    def optimizer(self, micro_batches: int, shards: int) -> list[Op]:
        """Weights become fp16 and gradients fp32; unscaling and Adam take 22.5 passes in fp32."""
        casts = 2 * (FP32 + FP16)
        cost = Cost(bytes=self.parameters * (casts + 22.5 * FP32))
        return [Op("optimizer", cost, launches=60 + 12 * self.model.num_layers)]


class NarrowLanguini(Languini):
    """The smallest of these models has heads of 32."""

    attention_width = 256


def _gpt(num_layers: int, hidden_size: int, heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_kv_heads=heads,
        expert_intermediate_size=4 * hidden_size,
        vocab_size=16_384,
        tie_word_embeddings=False,
    )


MODELS = {
    "mini": _gpt(4, 512, 8),
    "tiny": _gpt(4, 768, 12),
    "small": _gpt(12, 768, 12),
    "medium": _gpt(24, 1024, 16),
    "large": _gpt(24, 1536, 16),
}


@dataclass(frozen=True)
class PublicRun:
    gpu: str
    size: str
    batch_size: int
    step_ms: float

    @property
    def is_fitted(self) -> bool:
        """The 3090's efficiencies were taken from this run among others."""
        return self.gpu == "rtx-3090" and self.size in FITTED_SIZES

    def predict(self, reached: Efficiency | None = None, wait: float = WAIT) -> StepPrediction:
        kind = NarrowLanguini if self.size == "mini" else Languini
        changes = {"seq_len": SEQ_LEN, "batch_size": self.batch_size}
        config = replace(OPTIONS["a"], model=MODELS[self.size], **changes)
        policies = (NONE,) * config.model.num_layers
        gpu, rows = GPUS[self.gpu], self.batch_size
        prediction = predict(config, gpu, policies, rows, kind=kind, reached=reached)
        prediction.milliseconds["gaps"] += 1e3 * wait
        return prediction

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size * SEQ_LEN / self.step_ms * 1e3

    @cached_property
    def error(self) -> float:
        """The error is predicted over measured tokens/s, less one."""
        return self.step_ms / self.predict().step_ms - 1


def read_runs() -> list[PublicRun]:
    with (Path(__file__).parent / "languini.csv").open() as file:
        rows = csv.DictReader(file)
        return [PublicRun(r["gpu"], r["size"], int(r["batch"]), float(r["step_ms"])) for r in rows]


PUBLIC_RUNS = read_runs()


PRIOR = {
    # cuBLAS on a 3090 at dimensions of 2,048 and more, TFLOP/s: 59.0 and 75.2 over a minute (torch
    # 1.8, daydreamatnight.github.io), 65.5 (KnowingNothing/MatmulTutorial), 72.1 and 74.7 (torch
    # 2.8, AvrovaDonz2026/CAT-YOKO): their mean and deviation.
    "matmul": (69.3 / 71.2, 0.10),
    # The same die at 1,024 and 8,192 (3080 Ti, zzc0721/torch-performance-test-data issue 144): 55.1
    # and 71.4, of which the former has four fifths of one wave of tiles.
    "half_dim": (100, 0.7),
    # Memory-bound kernels of a 3090 reach 700 to 860 GB/s: a*x 793 (daydreamatnight.github.io),
    # fused transposes 833 (NVIDIA/Fuser, test_gpu_transpose.cpp), a copy 830 (Puget Systems).
    "bandwidth": (780 / 936, 0.07),
    "wait": (2e-3, 0.7),
}
"""mean, and deviation of the logarithm, of what is fitted, from measurements of kernels"""
MODEL_DEVIATION = 0.02
"""of a size's steps from the model, in the logarithm"""


def fit(runs: Sequence[PublicRun], start: Efficiency) -> tuple[Efficiency, float]:
    """Efficiencies and GradScaler's wait are fitted to the logarithm of steps, and to PRIOR.

    Steps do not tell matmuls from traffic, since both grow with the tokens: what single kernels
    reached does. Gauss-Newton on logarithms; every size counts the same.
    """
    each = np.array([sum(r.size == run.size for r in runs) for run in runs])
    means, deviations = np.array(list(PRIOR.values())).T

    def changed(values: np.ndarray) -> tuple[Efficiency, float]:
        matmul, half_dim, bandwidth, wait = map(float, np.exp(values))
        flops = {**start.flops, "matmul": matmul}
        bandwidths = {"norm": bandwidth}
        return replace(start, flops=flops, half_dim=half_dim, bandwidth=bandwidths), wait

    def residuals(values: np.ndarray) -> np.ndarray:
        reached, wait = changed(values)
        steps = [run.predict(reached, wait).step_ms / run.step_ms for run in runs]
        return np.concatenate(
            [
                np.log(steps) / (MODEL_DEVIATION * each**0.5),
                (values - np.log(means)) / deviations,
            ]
        )

    values = np.log(means)
    for _ in range(6):
        now = residuals(values)
        slopes = [(residuals(values + step) - now) / 1e-3 for step in 1e-3 * np.eye(len(values))]
        values = values - np.linalg.lstsq(np.array(slopes).T, now, rcond=None)[0]
    return changed(values)


def quantiles(runs: Iterable[PublicRun]) -> tuple[float, float, float]:
    """Of the errors' magnitudes: the median, what nine of ten are within, the largest."""
    errors = np.abs([run.error for run in runs])
    return float(np.median(errors)), float(np.quantile(errors, 0.9)), float(errors.max())


def markdown_rows(runs: Iterable[PublicRun]) -> list[str]:
    """profiles/plan.md has these rows of every run of the RTX 3090."""
    return [
        f"| {run.size} | {run.batch_size} | {run.tokens_per_second:,.0f} | "
        f"{run.predict().tokens_per_second:,.0f} | {run.error:+.1%} | "
        f"{'yes' if run.is_fitted else 'no'} |"
        for run in runs
    ]


def quantile_row(name: str, runs: Sequence[PublicRun]) -> str:
    """profiles/plan.md has such a row of the fitted runs, of the others, of other cards."""
    middle, ninth, largest = quantiles(runs)
    mean = np.mean([run.error for run in runs])
    return f"| {name} | {len(runs)} | {middle:.1%} | {ninth:.1%} | {largest:.1%} | {mean:+.1%} |"


def quantile_rows() -> list[str]:
    on_3090 = [run for run in PUBLIC_RUNS if run.gpu == "rtx-3090"]
    groups = {
        "RTX 3090, fitted": [run for run in on_3090 if run.is_fitted],
        "RTX 3090, not fitted": [run for run in on_3090 if not run.is_fitted],
        "RTX 4090, by the 3090's shares of peak": [r for r in PUBLIC_RUNS if r.gpu == "rtx-4090"],
        "A100 80GB, by the H100's": [run for run in PUBLIC_RUNS if run.gpu == "a100-80gb"],
    }
    return [quantile_row(name, runs) for name, runs in groups.items()]


if __name__ == "__main__":
    on_3090 = [run for run in PUBLIC_RUNS if run.gpu == "rtx-3090"]
    reached, wait = fit([run for run in on_3090 if run.is_fitted], EFFICIENCIES["RTX 3090"])
    gpu = GPUS["rtx-3090"]
    print(
        f"fitted to {', '.join(sorted(FITTED_SIZES))}: "
        f"matmuls {reached.flops['matmul'] * gpu.bf16_tflops:.1f} TFLOP/s, "
        f"half_dim {reached.half_dim:.0f}, "
        f"{reached.bandwidth['norm'] * gpu.bandwidth_gbs:.0f} GB/s, wait {1e3 * wait:.2f} ms"
    )
    print("\n".join(markdown_rows(on_3090) + quantile_rows()))
