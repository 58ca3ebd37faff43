"""The module finds where a run computes: device, precision, memory budget."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.hardware import GIB, RESERVE_GIB, Gpu, identify
from hamner.parallel.ranks import Rank

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
"""is there where the driver is loaded"""
RAM_SHARE = 0.6
"""of the free memory of a machine without a GPU"""
INT8_ROW_MULTIPLE = 16
"""of hamner.kernels.int8_matmul's rows: of another length they are read byte by byte, and its
program spills"""
CPU_MICRO_BATCH_TOKENS = 1_024
"""A CPU gains nothing from more, and an interrupt waits for the end of a micro-batch."""


@dataclass(frozen=True)
class Compute:
    """A `Compute` says which device a run uses and how."""

    device: torch.device
    name: str
    gpu: Gpu | None
    precision: str
    """"bf16" or "fp32", of the matmuls"""
    kernels: str
    budget_bytes: int
    """memory a step may take"""
    max_micro_batch_tokens: int | None = None
    """bound for the automatic micro-batch, or None"""

    @property
    def dtype(self) -> torch.dtype:
        """The matmuls compute in this dtype."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def uses_gpu(name: Literal["auto", "cuda", "cpu"]) -> bool:
    """The function says whether `--device` means a GPU that is here."""
    return name != "cpu" and torch.cuda.is_available()


def why_no_gpu(name: Literal["auto", "cuda", "cpu"]) -> str:
    """The function says why `--device` means the CPU here."""
    if name == "cpu" and torch.cuda.is_available():
        return "--device cpu"
    if not NVIDIA_DRIVER.exists():
        return "no GPU found"
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return (
        f"no GPU found by PyTorch {torch.__version__}, built for {built_for}, though an NVIDIA "
        "driver is here (a newer driver, or another build of PyTorch, may find it)"
    )


def select_device(name: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """The function finds the device of `--device`.

    Raises:
        UserError: there is no such device here.
    """
    if name == "cuda" and not uses_gpu(name):
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if uses_gpu(name) else "cpu")


def select(config: TrainConfig) -> Compute:
    """The function resolves `--device`, `--precision`, `--kernels` and `--vram-budget`.

    Raises:
        UserError: what is asked for is not on this machine.
    """
    device = select_device(config.device)
    if device.type == "cuda":
        return _select_gpu(config)
    if config.precision == "bf16":
        raise UserError("--precision bf16 needs a GPU; use --precision fp32 on a CPU")
    if config.kernels in ("triton", "liger"):
        raise UserError(f"--kernels {config.kernels} needs a GPU; use --kernels torch on a CPU")
    if config.matmul != "bf16":
        raise UserError(f"--matmul {config.matmul} needs a GPU; use --matmul bf16 on a CPU")
    free_ram = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    ram = RAM_SHARE * free_ram / Rank.read().local_world_size
    budget = config.vram_budget * GIB if config.vram_budget else ram
    return Compute(
        device=device,
        name=f"CPU, {torch.get_num_threads()} threads",
        gpu=None,
        precision="fp32",
        kernels="torch",
        budget_bytes=int(budget),
        max_micro_batch_tokens=CPU_MICRO_BATCH_TOKENS,
    )


def _select_gpu(config: TrainConfig) -> Compute:
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8 and (config.precision != "fp32" or config.matmul != "bf16"):
        # What is not int8 under --matmul int8 is bf16.
        mend = "--precision fp32"
        if config.matmul != "bf16":
            mend += f" without --matmul {config.matmul}"
        raise UserError(
            f"{properties.name} has no bf16 matmuls (compute capability {properties.major}."
            f"{properties.minor}, 8.0 needed); use {mend}"
        )
    if config.kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise UserError("--kernels liger: liger-kernel is not installed; pip install -e '.[liger]'")
    require_int8(config)
    memory_gib = properties.total_memory / GIB
    budget = config.vram_budget or memory_gib - RESERVE_GIB
    if budget > memory_gib:
        raise UserError(
            f"--vram-budget {budget} GiB is more than the {memory_gib:.1f} GiB of {properties.name}"
        )
    return Compute(
        device=device,
        name=properties.name,
        gpu=identify(properties.name),
        precision="fp32" if config.precision == "fp32" else "bf16",
        kernels="triton" if config.kernels == "auto" else config.kernels,
        budget_bytes=int(budget * GIB),
    )


def require_int8(config: TrainConfig) -> None:
    """The function refuses `--matmul int8` where it cannot be.

    Raises:
        UserError: it names the flag to change.
    """
    if config.matmul == "bf16":
        return
    if config.precision == "fp32":
        raise UserError(f"--matmul {config.matmul} is for --precision bf16; use --matmul bf16")
    if config.kernels in ("torch", "liger"):
        raise UserError(
            f"--matmul {config.matmul} is of --kernels triton; use --matmul bf16 with "
            f"--kernels {config.kernels}"
        )
    model = config.model
    sizes = {"hidden-size": model.hidden_size}
    if not model.is_moe:
        sizes["expert-intermediate-size"] = model.expert_intermediate_size
    if config.matmul == "int8-all":
        sizes["seq-len"] = config.seq_len  # gradients of weights are sums over tokens
    for name, size in sizes.items():
        if rest := size % INT8_ROW_MULTIPLE:
            raise UserError(
                f"--matmul {config.matmul} takes multiples of {INT8_ROW_MULTIPLE} as --{name}, and "
                f"it is {size:,}; use {size - rest + INT8_ROW_MULTIPLE:,} or --matmul bf16"
            )
    if model.qkv_size % INT8_ROW_MULTIPLE:
        raise UserError(
            f"--matmul {config.matmul} takes queries, keys and values of a multiple of "
            f"{INT8_ROW_MULTIPLE} numbers a token, and --num-attention-heads "
            f"{model.num_attention_heads} with --num-kv-heads {model.num_kv_heads} gives "
            f"{model.qkv_size:,}; use other numbers of heads or --matmul bf16"
        )


def cap_memory(compute: Compute, config: TrainConfig) -> None:
    """A `--vram-budget` is a promise to the user's other programs: exceeding it fails from here on.

    Without a budget there is no cap.
    """
    if config.vram_budget and compute.device.type == "cuda":
        memory_gib = torch.cuda.get_device_properties(compute.device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(config.vram_budget / memory_gib, compute.device)
