"""The module measures attention backends on the GPU at hand, and remembers the times.

The times are kept in a small JSON file in the user's cache folder, by GPU, shape and versions:
whoever starts the same run again starts with the same backend, at once.
"""

import contextlib
import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hamner.config.model import ModelConfig
from hamner.errors import UserError
from hamner.files import made_whole, read_json
from hamner.kernels.rope import rope_packed_

DOCUMENT_LENGTH = 350  # tokens: about the mean of web text
WARM_UP, REPEATS = 3, 7

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """A shape is what the attention of a run is asked for."""

    device: torch.device
    dtype: torch.dtype
    """of the activations"""
    head_size: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    micro_batch_size: int
    """of one forward pass"""
    document_mask: bool = False
    """whether packed documents are kept apart"""
    folds_rope: bool = False
    """whether triton is given RoPE's backward pass too, as standard attention under
    `--kernels triton` does: auto then counts RoPE's own kernel against the others"""

    @classmethod
    def of_model(cls, model: ModelConfig, **settings) -> "AttentionShape":
        """`of_model` takes the heads from a model's configuration and the rest from `settings`."""
        return cls(
            head_size=model.head_size,
            num_heads=model.num_attention_heads,
            num_kv_heads=model.num_kv_heads,
            **settings,
        )

    def rotates_apart(self, backend: str) -> bool:
        """A layer may run RoPE's backward pass by a kernel of its own, whose time is the
        backend's."""
        return self.folds_rope and backend != "triton"


def waits_for_gpu(backend: str, document_mask: bool) -> bool:
    """A backend that waits stops the host until the GPU has caught up, once a batch; no CUDA graph
    can record it."""
    return backend == "flash-attn" and document_mask


def fastest(shape: AttentionShape, functions: Mapping[str, Function]) -> tuple[str, str]:
    """The function names the fastest backend and says why.

    Args:
        functions: attention on packed qkv, by backend.

    Raises:
        RuntimeError: none of them ran.
    """
    cache, key = cache_file(), cache_key(shape, "flash-attn" in functions)
    milliseconds, failures = _read(cache).get(key), {}
    if not _are_times(milliseconds, of=functions):
        milliseconds = {}
        for name, function in functions.items():
            # Whatever goes wrong in one (out of memory, an extension built for another torch) must
            # not keep the run from the others.
            try:
                milliseconds[name] = measure(shape, name, function)
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.cuda.empty_cache()
        if not failures:
            _write(cache, _read(cache) | {key: milliseconds})
    if not milliseconds:
        raise RuntimeError("no attention backend ran: " + "; ".join(failures.values()))
    best = min(milliseconds, key=milliseconds.__getitem__)
    others = [f"{name} {time:.2f}" for name, time in milliseconds.items() if name != best]
    why = f"{milliseconds[best]:.2f} ms forward + backward per layer"
    if others:
        why += f" against {', '.join(others)}"
    return best, ", ".join([why, *(f"{name} failed ({why})" for name, why in failures.items())])


def measure(shape: AttentionShape, backend: str, function: Function) -> float:
    """The function gives median milliseconds of forward and backward on the GPU.

    Where possible both are replayed as a CUDA graph, as the trainer's step does: launched one by
    one, the backend of many small kernels would be charged for Python's time between them.

    Raises:
        RuntimeError: the output or its gradient is not finite: a package may hold kernels for some
            head sizes only, and say nothing.
    """
    generator = torch.Generator(shape.device).manual_seed(0)
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    tokens = shape.micro_batch_size, shape.seq_len

    def randn(width: int) -> Tensor:
        size = (*tokens, width * shape.head_size)
        return torch.randn(size, generator=generator, device=shape.device, dtype=shape.dtype)

    qkv, d_out = randn(num_heads + 2 * num_kv_heads).requires_grad_(), randn(num_heads)
    document_ids = None
    if shape.document_mask:
        positions = torch.arange(shape.seq_len, dtype=torch.int32, device=shape.device)
        document_ids = (positions // DOCUMENT_LENGTH).expand(tokens).contiguous()

    table = torch.ones(shape.seq_len, shape.head_size // 2, device=shape.device)

    def run() -> tuple[Tensor, Tensor]:
        out = function(qkv, num_heads, num_kv_heads, document_ids=document_ids)
        (d_qkv,) = torch.autograd.grad(out, qkv, d_out)
        if shape.rotates_apart(backend):
            heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
            rope_packed_(d_qkv.contiguous(), table, table, **heads, inverse=True)
        # Detached: a graph kept alive from here would break the recording of the next.
        return out.detach(), d_qkv

    with torch.cuda.device(shape.device):
        for _ in range(WARM_UP):
            results = run()
        if not all(result.isfinite().all() for result in results):
            raise RuntimeError("its result is not finite")
        timed = run
        if not waits_for_gpu(backend, shape.document_mask):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
            timed = graph.replay
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
        for start, end in events:
            start.record()
            timed()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def cache_file() -> Path | None:
    """Times are kept in $XDG_CACHE_HOME or ~/.cache, hamner/attention.json; None without a home."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(folder) if folder else Path.home() / ".cache") / "hamner" / "attention.json"
    except RuntimeError:
        return None


def cache_key(shape: AttentionShape, has_flash_attn: bool) -> str:
    """The key names all that the times depend on, in words."""
    packages = ["hamner", "torch", "triton"]
    if has_flash_attn:
        packages.append("flash-attn")
    return ", ".join(
        [
            torch.cuda.get_device_name(shape.device),
            *(f"{package} {_version(package)}" for package in packages),
            str(shape.dtype).removeprefix("torch."),
            f"{shape.micro_batch_size} x {shape.seq_len}",
            f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_size}",
            "documents" if shape.document_mask else "no documents",
            "rope folded" if shape.folds_rope else "rope apart",
        ]
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _are_times(times: object, of: Mapping) -> bool:
    """A damaged entry, or one of other backends, holds no times of these."""
    return (
        isinstance(times, dict)
        and times.keys() == of.keys()
        and all(isinstance(time, int | float) and time > 0 for time in times.values())
    )


def _read(file: Path | None) -> dict:
    try:
        return read_json(file) if file else {}
    except UserError:
        return {}


def _write(file: Path | None, entries: dict) -> None:
    """Times are remembered; a folder that cannot be written to only means measuring again."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with made_whole(file) as temporary:
            temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
