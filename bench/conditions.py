"""A row has the conditions under which it was measured: a number is worth nothing without them."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

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
    """The function gives GPU, driver, power limit and clocks as nvidia-smi says them, versions and
    commit."""
    found = _gpu() if torch.cuda.is_available() else {"cpu": platform.processor() or "unknown"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _output(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    )
    return found


def _gpu() -> dict[str, str]:
    # Under load: an idle GPU lowers its clocks.
    x = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(200):
        x @ x
    query = ",".join(_QUERIES.values())
    index = str(torch.cuda.current_device())
    line = _output(
        ["nvidia-smi", "-i", index, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    )
    torch.cuda.synchronize()
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(_QUERIES):
        return {"gpu": torch.cuda.get_device_name()}
    return dict(zip(_QUERIES, values, strict=True))


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()
