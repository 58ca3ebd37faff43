"""A row has the conditions under which it was measured: a number is worth nothing without them."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "flash-attn")
_QUERIES = {
    "gpu": "name",
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
}


@functools.cache
def conditions() -> dict[str, str]:
    """The function gives GPU, driver, power limit and clocks as nvidia-smi says them, versions,
    commit and what the environment tells NCCL."""
    found = _gpu() if torch.cuda.is_available() else {"cpu": platform.processor() or "unknown"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["commit"] = _output(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    )
    return found | {n: value for n, value in os.environ.items() if n.startswith("NCCL_")}


def in_words(found: Mapping[str, str]) -> str:
    """The function lists conditions, but for the clocks, which are another at every moment."""
    return ", ".join(f"{name} {value}" for name, value in found.items() if "clock" not in name)


def _gpu() -> dict[str, str]:
    # Under load: an idle GPU lowers its clocks.
    x = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(200):
        x @ x
    values = nvidia_smi(*_QUERIES.values())
    torch.cuda.synchronize()
    if values is None:
        return {"gpu": torch.cuda.get_device_name()}
    return dict(zip(_QUERIES, values, strict=True))


def nvidia_smi(*fields: str) -> list[str] | None:
    """The function gives what nvidia-smi says of the GPU in use (`--help-query-gpu` lists the
    fields), or None if it does not."""
    # Its numbers are not torch's where CUDA_VISIBLE_DEVICES leaves some out.
    gpu = f"GPU-{torch.cuda.get_device_properties().uuid}"
    query = f"--query-gpu={','.join(fields)}"
    line = _output(["nvidia-smi", "-i", gpu, query, "--format=csv,noheader,nounits"])
    values = [value.strip() for value in line.split(",")]
    return values if len(values) == len(fields) and line != "unknown" else None


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()
