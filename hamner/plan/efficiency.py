"""An efficiency says what share of a card's peak each kind of kernel reaches, and how surely.

Each figure has its source beside it; profiles/plan.md says how they were fitted and what is left
when rows that were not fitted are predicted.
"""

from dataclasses import dataclass, replace
from functools import cache

from hamner.errors import UserError
from hamner.hardware import Gpu

_LOWEST, _UTMOST = 0.1, 2
"""times its own clock or power between which a card is set"""


@dataclass(frozen=True)
class Efficiency:
    """An efficiency is what each kind of kernel reaches on a card."""

    flops: dict[str, float]
    """kind: share of the bf16 peak; attention causal, counting half of the square"""
    half_dim: float
    """smallest of a matmul's M, N and K at which it reaches half of its share"""
    half_seq_len: float
    """sequence length at which attention reaches half of its share"""
    bandwidth: dict[str, float]
    """kind: share of the memory bandwidth; "norm" also stands for kinds that are not listed"""
    ranges: dict[str, tuple[float, float]]
    """cause: the factors on speed between which about nine of ten cards or runs lie; clock, matmul,
    attention, bandwidth, model (what the roofline leaves out), stand-in (another card's shares)"""
    provenance: str
    why: dict[str, str]
    """cause: what its range is from"""
    clock_mhz: float | None = None
    """what was reached was reached at this clock; None: at that of the card's peak"""
    power_w: float | None = None
    """power limit, likewise; None: that of the card as sold"""

    def arithmetic_seconds(self, kind: str, flops: float, dim: int, gpu: Gpu) -> float:
        """So many FLOPs take this long; `dim` is the smallest of a matmul, or attention's T."""
        share = self.flops.get(kind, 1.0)
        if dim:
            half = self.half_seq_len if kind.startswith("attention") else self.half_dim
            share *= dim / (dim + half)
        return flops / (gpu.bf16_tflops * 1e12 * share)

    def traffic_seconds(self, kind: str, moved: float, gpu: Gpu) -> float:
        """So many bytes take this long."""
        share = self.bandwidth.get(kind, self.bandwidth["norm"])
        return moved / (gpu.bandwidth_gbs * 1e9 * share)

    def at_clock(self, gpu: Gpu, clock_mhz: float) -> "Efficiency":
        """The arithmetic runs at a clock that is known: what nvidia-smi shows under load.

        Raises:
            UserError: the clock that the shares are of is not known, or far below this one.
        """
        known = self.clock_mhz or gpu.clock_mhz
        if known is None:
            raise UserError(
                f"--clock {clock_mhz:g}: the clock of the {gpu.name} is not known, leave the flag "
                "out"
            )
        _require_unit(f"--clock {clock_mhz:g}", clock_mhz, known, "MHz", gpu=gpu)
        why = f"held at {clock_mhz:,.0f} MHz, {clock_mhz / known:.0%} of {known:,.0f}"
        return self._scaled(clock_mhz / known, (0.98, 1.02), why)

    def at_power(self, gpu: Gpu, power_w: float) -> "Efficiency":
        """The arithmetic runs at the clock that a power limit leaves.

        Where voltage goes up with the clock, power goes with its cube; an RTX 3090 keeps 95% of its
        training speed at 280 of 350 W (Puget Systems 2020, "Quad RTX3090 GPU Wattage Limited"). On
        a hot card under full load the speed goes with the power, which is the low end.

        Raises:
            UserError: the power limit that the shares are of is not known, or far below this one.
        """
        known = self.power_w or gpu.power_w
        if known is None:
            raise UserError(
                f"--power-limit {power_w:g}: the power limit of the {gpu.name} is not known, leave "
                "the flag out"
            )
        _require_unit(f"--power-limit {power_w:g}", power_w, known, "W", gpu=gpu)
        share = power_w / known
        factor = share ** (1 / 3)
        low, high = self.ranges.get("clock", (1.0, 1.0))
        why = (
            f"limited to {power_w:g} of {known:g} W, taken as a clock of {factor:.0%}, by the cube "
            "root, and at worst as proportional"
        )
        return self._scaled(factor, (min(low, share / factor), high), why)

    def for_matmul(self, matmul: str, gpu: Gpu) -> "Efficiency":
        """The linear layers multiply as `--matmul` says; in int8 they reach so many times what bf16
        ones do, see `_int8_gain`.

        Raises:
            UserError: the card's int8 rate is not known.
        """
        if matmul == "bf16" or "int8" in self.flops:
            return self
        if gpu.int8_tops is None:
            raise UserError(
                f"--matmul {matmul}: the int8 rate of the {gpu.name} is not known; use --matmul "
                "bf16"
            )
        gain, bf16 = _int8_gain(gpu), self.flops["matmul"]
        return replace(
            self,
            flops={**self.flops, "int8": gain.rows * bf16, "int8_grouped": gain.grouped * bf16},
            bandwidth={
                **self.bandwidth,
                "quantisation_transposed": _TRANSPOSED * self.bandwidth["norm"],
            },
            ranges={**self.ranges, "int8": gain.factors},
            why={**self.why, "int8": str(gain)},
            provenance=f"{self.provenance}; {gain}",
        )

    def _scaled(self, factor: float, clock: tuple[float, float], why: str) -> "Efficiency":
        return replace(
            self,
            flops={kind: factor * share for kind, share in self.flops.items()},
            ranges={**self.ranges, "clock": clock},
            why={**self.why, "clock": why},
        )


@dataclass(frozen=True)
class _Int8Gain:
    """Int8 matmuls are so many times as fast as bf16 ones of the same shape."""

    rows: float
    """with one scale a row"""
    grouped: float
    """with one each 256 of the reduced axis"""
    factors: tuple[float, float]
    """on both, between which about nine of ten cards lie"""
    source: str

    def __str__(self) -> str:
        low, high = self.factors
        rows, grouped = (
            f"{ratio:.2f} times ({low * ratio:.1f} to {high * ratio:.1f})"
            for ratio in (self.rows, self.grouped)
        )
        return (
            f"int8 matmuls {rows} as fast as bf16 ones, {grouped} where 256 products share a "
            f"scale: {self.source}"
        )


# An sm_86's code on an H200, whose mma.sync multiplies int8 at twice bf16's rate (profiles/LOG.md,
# 2026-11-29): what has one scale a row in a step of option a takes 1.097 ms a layer, a plain bf16
# matmul of the same shapes 1.882 (single ones 1.61 to 1.89 times as long); down's forward and
# gate_up's data gradient 0.837 and 1.137, and the gradients of weights, which count as those two,
# 1.347 and 1.939 (1.28 to 1.73). Where int8 has four times bf16's rate, as on GeForce cards, that
# is taken twice. It holds if int8 comes as near to its peak as bf16 does. That is what the low end
# doubts: of the 622 TFLOP/s that mma.sync has on an H200 (0.63 of wgmma's, arXiv:2402.13499) the
# plain matmul reached 363 and 374, where cuBLAS reaches 0.85 of a 3090's at these widths. If int8
# stays at the H200's shares of its own peak (622 and 508 of 1,244), it is 2.3 and 1.9 times as fast
# there. And an RTX 5090 at 400 W, of 4 to 1 too, has 2.7 to 2.9 in a Triton kernel with one scale a
# row, 2.3 to 2.4 with scales of blocks (gau-nernst/gn-kernels, sizes 2,048 and 4,096). High end: a
# 4090's bare instructions, 676 and 179.
_INT8_AS_8_6 = _Int8Gain(
    1.72,
    1.36,
    (0.67, 1.06),
    "an RTX 3090's int8 code beside its bf16 code, on an H200 and by this card's ratio of peaks, "
    "not measured on this card",
)
# The matmuls of a layer of option a beside cuBLAS's of the same shapes in the same run
# (profiles/LOG.md, 2026-11-30): 0.747 and 1.041 ms with one scale a row (single ones 1.29 to 1.47
# times as fast), 1.721 and 1.449 with scales of 256 (0.49 to 0.97). Other sizes have other ratios.
_INT8_ON_HOPPER = _Int8Gain(
    1.39,
    0.84,
    (0.87, 1.12),
    "measured on an H200 at the sizes of option a",
)
_INT8_BY_CARD = dict.fromkeys(("H100 SXM", "H100 PCIe", "H200"), _INT8_ON_HOPPER)
_TRANSPOSED = 0.85
"""of a norm's GB/s are the quantiser's where it writes the transpose: 3,203 on an H200"""


def _int8_gain(gpu: Gpu) -> _Int8Gain:
    if gpu.name in _INT8_BY_CARD:
        return _INT8_BY_CARD[gpu.name]
    gain, times = _INT8_AS_8_6, round(gpu.int8_tops / gpu.bf16_tflops) / 2
    return replace(gain, rows=times * gain.rows, grouped=times * gain.grouped)


# H100 SXM and H200. Matmuls, grouped ones and what a kernel costs beside its work are fitted to the
# steps of profiles/plan.md: 24576x1024x1536 678 TFLOP/s, x5632 677, x49152 641, 24576x2816x1024
# 700, 49152x768x3072 629, 49152x1536x768 659 and 8192^3 776, measured apart, are within 9% of 800 *
# m / (m + 152), m the smallest dimension. Attention, head size 64, forward and backward TFLOP/s at
# T 512 (225, 217), 1024 (311, 277), 2048 (378, 317), 8192 (422, 350), and the GB/s of kernels, are
# those of profiles/benchmarks-h100.md; a norm's those of its kernels in a step. An H200's copies
# and RoPE reach less of its nominal bandwidth (4,250 of 4,800 GB/s where an H100's reach 3,000 of
# 3,352; RoPE 3,569 and 2,613), and its matmuls run as much slower as its steps say. Muon's
# iteration is what it added to an H200's step of option a (profiles/LOG.md, 2026-11-29).
_HOPPER_FLOPS = {
    "matmul": 800 / 989.4,
    "attention_forward": 440 / 989.4,
    "attention_backward": 372 / 989.4,
    "matmul_grouped": 458 / 989.4,
    "optimizer_muon": 307 / 989.4,
}
_HOPPER_BANDWIDTH = {
    "norm": 2745 / 3352,
    "swiglu": 2950 / 3352,
    "rope": 2613 / 3352,
    "loss": 2899 / 3352,
    "optimizer": 2950 / 3352,
}
_H100 = Efficiency(
    flops=_HOPPER_FLOPS,
    half_dim=152,
    half_seq_len=380,
    bandwidth=_HOPPER_BANDWIDTH,
    ranges={"clock": (0.97, 1.02), "model": (0.96, 1.04)},
    why={
        "clock": "the same step took 2.5% longer on the same card once it was warm",
        "model": "all steps measured on an H100 and an H200 were within 4%",
    },
    provenance="kernel efficiencies measured on an H100 SXM (routing assumed as norms)",
)
_H200 = replace(
    _H100,
    flops={kind: 0.976 * share for kind, share in _HOPPER_FLOPS.items()},
    bandwidth={kind: 0.947 * share for kind, share in _HOPPER_BANDWIDTH.items()},
    provenance="kernel efficiencies measured on an H100 SXM, matmuls and bandwidth fitted to "
    "steps of an H200 (routing assumed as norms)",
)

# RTX 3090. Matmuls, half_dim and bandwidth are fitted to 17 steps of another trainer
# (tests/plan/public_runs.py, with what single kernels reached as a prior). Attention: flash-attn 2
# at head size 64, causal, reaches 0.86 of peak forward and 0.58 backward at T 2048 on an RTX 4090,
# whose multiprocessors have a 3090's ratio of tensor cores to the rest (tl_doc/flash_perf.md in a
# fork of apache/tvm), and 53 and 52 TFLOP/s at T 4096 on a GPU not named that fits a 3090
# (flash-attention issue 416). Where it halves: on an RTX A5000, without a mask, forward and
# backward together reach 0.53, 0.60, 0.66 and 0.69 of peak at T 512, 1024, 2048 and 4096
# (gpu-mode/ring-attention issue 10), so at 190, and under the mask tiles on the diagonal cost a
# tenth at T 1024: 300. Between the two cards, so 47 and 39 at T 1024. These kernels, as sm_86's
# code on an H200, reach 0.60 and 0.43 of a plain mma.sync matmul's rate there (profiles/LOG.md,
# 2026-11-29): 40 and 29 of a 3090's 66.4, if all else cost as much beside the matmuls as there, and
# 52 and 39 as those take 3.8 times the clocks on an sm_86. Grouped: likewise 0.81 at 768 columns,
# and on a 3090 a batched product of 20 experts has 0.72 and 0.77 of a dense one's rate
# (AvrovaDonz2026/CAT-YOKO, artifacts/autodl-rtx3090); between, so 51. Muon's iteration is
# assumed: batches of small products.
_RTX_3090 = Efficiency(
    flops={
        "matmul": 66.4 / 71.2,
        "attention_forward": 61 / 71.2,
        "attention_backward": 50 / 71.2,
        "matmul_grouped": 51 / 71.2,
        "optimizer_muon": 50 / 71.2,
    },
    half_dim=95,
    half_seq_len=300,
    bandwidth={"norm": 776 / 936},
    ranges={
        "clock": (0.88, 1.08),
        "matmul": (0.96, 1.08),
        "attention": (0.85, 1.15),
        "bandwidth": (0.91, 1.07),
        "model": (0.95, 1.05),
    },
    why={
        "clock": "1.49-1.83 GHz where 1.70 is taken; cards ran at 1.75-1.95 and, hot, down to 1.37",
        "matmul": "66-70 TFLOP/s at large sizes, by which steps are fitted; 72-77 in short runs",
        "attention": "35-47 TFLOP/s at T 1,024: other cards' shares of peak, as nobody published "
        "a 3090's backward pass; 31-42 by these kernels' code on an H200",
        "bandwidth": "700-830 GB/s of memory-bound kernels",
        "model": "nine of ten steps of another trainer that were not fitted were within 4%",
    },
    provenance="kernel efficiencies fitted to steps of another trainer on an RTX 3090, attention's "
    "and grouped matmuls' taken from other cards, none measured with these kernels: at large "
    "sizes matmuls 66.4 of 71.2 TFLOP/s, grouped ones 51, attention 61 and 50 forward and "
    "backward, 776 of 936 GB/s",
)
EFFICIENCIES = {"H100 SXM": _H100, "H200": _H200, "RTX 3090": _RTX_3090}
_STAND_INS = dict.fromkeys(("H100 PCIe", "A100 40GB", "A100 80GB"), "H100 SXM")
# tests/plan/public_runs.py: by the H100's shares an A100's steps are 17-22% too fast, by the 3090's
# a 4090's up to 11% too slow.
_STAND_IN_RANGES = {
    "H100 SXM": ((0.80, 1.05), "another trainer's largest steps on an A100 took 17-22% longer"),
    "RTX 3090": ((0.93, 1.12), "another trainer's largest steps on a 4090 took 2-11% less"),
}


def _require_unit(given: str, value: float, known: float, unit: str, *, gpu: Gpu) -> None:
    """The function refuses a value that can only be meant in another unit, such as GHz.

    Args:
        given: the flag and its value.
        value: in `unit`, as what the card has as it is sold.
        known: that.
        unit: of both.
        gpu: the card.

    Raises:
        UserError: it names the unit.
    """
    if not _LOWEST <= value / known <= _UTMOST:
        bound = f"more than {_UTMOST}" if value > known else f"less than {_LOWEST}"
        raise UserError(
            f"{given} is {bound} times the {known:,.0f} {unit} of the {gpu.name}: give {unit}"
        )


@cache
def efficiency(gpu: Gpu) -> Efficiency:
    """A card has its own row, or a related card's shares of peak and a provenance to say so."""
    if gpu.name in EFFICIENCIES:
        return EFFICIENCIES[gpu.name]
    stand_in = _STAND_INS.get(gpu.name, "RTX 3090")
    base = EFFICIENCIES[stand_in]
    factors, why = _STAND_IN_RANGES[stand_in]
    return replace(
        base,
        ranges={**base.ranges, "stand-in": factors},
        why={
            **{cause: f"as of the {stand_in}: {reason}" for cause, reason in base.why.items()},
            "stand-in": f"the {stand_in}'s shares of peak: {why}",
        },
        provenance=f"kernel efficiencies assumed, not measured: the {stand_in}'s shares of peak",
    )


MEASURED_ERRORS: dict[str, tuple[int, float, float]] = {
    "H100 SXM": (25, -0.03, 0.03),
    "RTX 3090": (1, -0.05, -0.05),
    "H200": (20, -0.02, 0.03),
}
"""card: how many runs were measured on it (profiles/plan.md), and the lowest and highest error of
the speed predicted for them; a test holds them to the runs"""
