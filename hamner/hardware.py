"""The table says what GPUs can do: dense peak by dtype, memory, shared memory, links.

Vendor figures without sparsity, at boost clock; matrix products accumulate in fp32. A card that is
not in the table is "unknown", never measured against another card's peak. Torch-free.
"""

import re
from dataclasses import dataclass

GIB = 2**30
RESERVE_GIB = 2.0
"""of a GPU's memory left to the CUDA context, to fragmentation and to the desktop"""


@dataclass(frozen=True)
class Link:
    """A link connects the GPUs of one machine."""

    name: str
    gbs: float
    """GB/s each way that ring collectives reach; assumed, not measured"""


# GeForce drivers let no GPU read another's memory over PCIe: everything goes through the host's.
PCIE4 = Link("PCIe 4.0 x16 through host memory", 10)
PCIE5 = Link("PCIe 5.0 x16 through host memory", 25)
PCIE5_PEER = Link("PCIe 5.0 x16", 40)
# Four fifths of 300 and of 450 GB/s.
NVLINK3 = Link("NVLink 3", 240)
NVLINK4 = Link("NVLink 4", 360)


@dataclass(frozen=True)
class Gpu:
    """A GPU is one model of card."""

    name: str
    pattern: str
    """regular expression that the driver's name for the card matches"""
    bf16_tflops: float
    """dense bf16 matmul peak, TFLOP/s with fp32 accumulation"""
    fp32_tflops: float
    """fp32 peak outside the tensor cores, TFLOP/s"""
    bandwidth_gbs: float
    """device memory bandwidth, GB/s (10^9 bytes)"""
    memory_gib: float
    """device memory, GiB (2^30 bytes)"""
    shared_memory_bytes: int
    """largest shared memory of one thread block"""
    link: Link
    """to the others of its machine, with no bridge added"""
    clock_mhz: int | None = None
    """of the multiprocessors, at which the peaks are reached; None: not known"""
    power_w: int | None = None
    """power limit as sold; None: not known"""
    int8_tops: float | None = None
    """dense int8 matmul peak, TOP/s; None: not known"""

    def peak_tflops(self, precision: str) -> float:
        """The peak for `precision` ("bf16" or "fp32") is in TFLOP/s."""
        return {"bf16": self.bf16_tflops, "fp32": self.fp32_tflops}[precision]


GPUS: dict[str, Gpu] = {
    "rtx-3090": Gpu(
        "RTX 3090", r"3090(?! Ti)", 71.2, 35.6, 936, 24, 101_376, PCIE4, 1695, 350, 284
    ),
    "rtx-3090-ti": Gpu(
        "RTX 3090 Ti", r"3090 Ti", 80.0, 40.0, 1008, 24, 101_376, PCIE4, 1860, 450, 320
    ),
    "rtx-4090": Gpu(
        "RTX 4090", r"RTX 4090(?! D)", 165.2, 82.6, 1008, 24, 101_376, PCIE4, 2520, 450, 660.6
    ),
    "rtx-5090": Gpu(
        "RTX 5090", r"RTX 5090(?! D)", 209.5, 104.8, 1792, 32, 101_376, PCIE5, 2407, 575, 838
    ),
    "a100-40gb": Gpu(
        "A100 40GB", r"A100.*40GB", 312.0, 19.5, 1555, 40, 166_912, NVLINK3, 1410, 400, 624
    ),
    "a100-80gb": Gpu(
        "A100 80GB", r"A100.*80GB", 312.0, 19.5, 2039, 80, 166_912, NVLINK3, 1410, 400, 624
    ),
    "h100": Gpu(
        "H100 SXM",
        r"H100(?! PCIe| NVL).*80GB",
        989.4,
        66.9,
        3352,
        80,
        232_448,
        NVLINK4,
        1830,
        700,
        1978.9,
    ),
    "h100-pcie": Gpu(
        "H100 PCIe", r"H100 PCIe", 756.0, 51.2, 2039, 80, 232_448, PCIE5_PEER, 1620, 350, 1513
    ),
    "h200": Gpu(
        "H200", r"H200(?! NVL)", 989.4, 66.9, 4800, 141, 232_448, NVLINK4, 1830, 700, 1978.9
    ),
}


def identify(device_name: str) -> Gpu | None:
    """The function finds the entry for the driver's `device_name`; None is an unknown GPU."""
    known = (gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_name))
    return next(known, None)
