"""A newer GPU executes the kernels of an older one: compiled for it, with its launch table rows.

    with as_capability("8.6") as kernels:
        ...

A driver compiles the PTX of any earlier capability for the GPU it has. So while the manager is open
Triton is given the older GPU's capability and shared memory, the launch tables choose that GPU's
rows, and each kernel is handed to the driver as PTX instead of as a binary. What comes out is the
older GPU's code, instruction for instruction as far as PTX goes (`mma.sync`, never `wgmma`), and no
more blocks of a kernel share a multiprocessor than shared memory allows there: what starves on the
older GPU for want of warps would not starve where there is room for twice as many. The registers
are allocated anew, and clocks, caches and the number of multiprocessors are the newer GPU's. cuBLAS
and other compiled libraries keep to the GPU's own code.
"""

import contextlib
import dataclasses
import gc
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.compiler.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction

from hamner.errors import UserError
from hamner.hardware import GPUS

SMALLEST = {"8.6": "rtx-3090", "8.0": "rtx-4090", "9.0": "h200"}
"""launch table row -> the GPU with the smallest shared memory that uses it: "8.0" serves 8.9 too"""
SHARED_MEMORY_LIMIT = {row: GPUS[name].shared_memory_bytes for row, name in SMALLEST.items()}
"""launch table row -> bytes of shared memory a block may use"""


class Multiprocessor(NamedTuple):
    """A multiprocessor has room for so many blocks, threads and bytes of shared memory at once."""

    blocks: int
    threads: int
    shared: int


# CUDA C++ programming guide, technical specifications per compute capability.
MULTIPROCESSORS = {
    "8.6": Multiprocessor(16, 1536, 102_400),
    "8.0": Multiprocessor(24, 1536, 102_400),
}
"""launch table row -> of the same GPU"""
RESERVED = 1024
"""bytes of shared memory that CUDA itself takes of each block, from 8.0 on"""
OLDER = ((8, 6), (8, 0))
"""the capabilities whose code a newer GPU can execute: that of 9.0 (sm_90a) is for 9.0 only"""


@dataclasses.dataclass(frozen=True)
class LoadedKernel:
    """A kernel was loaded, which Triton does when it first launches it.

    `registers` and `spills` (of 4 bytes, a thread) are what the driver made of the PTX on the GPU
    at hand.
    """

    name: str
    capability: str
    num_warps: int
    num_stages: int
    max_registers: int | None
    constexprs: dict[str, object]
    shared: int
    registers: int
    spills: int
    cubin: Path
    """as ptxas compiled it for `capability`, whether or not that is what the driver runs"""


class WrongCodeError(Exception):
    """The error says that a kernel is not the older GPU's code."""


@contextlib.contextmanager
def as_capability(capability: str | None) -> Iterator[list[LoadedKernel]]:
    """While it is open, this process compiles and launches Triton kernels as a GPU of `capability`
    would; managers may be nested, also to return to the GPU's own capability.

    Kernels and CUDA graphs made before stay valid, and are what later calls use again once it
    is closed. What `torch.compile` made before it is compiled anew. Other processes, those that
    this one starts included, are not affected.

    Args:
        capability: "8.6" or "8.0", if the GPU is not older; None: the GPU's own.

    Yields:
        All kernels that this process has loaded as that capability, in the order of their first
        launch; the list grows.

    Raises:
        UserError: the GPU cannot execute that code.
        WrongCodeError: at the first launch of a kernel that is not compiled for `capability` or
            holds instructions that its GPUs lack.
        OutOfResources: there, of one that takes more shared memory than they have.
    """
    driver = triton.runtime.driver.active
    own = _own.get("capability") or torch.cuda.get_device_capability()
    capability = capability or "{}.{}".format(*own)
    wanted = next((row for row in (own, *OLDER) if capability == "{}.{}".format(*row)), None)
    if wanted is None or wanted > own:
        names = " or ".join("{}.{}".format(*row) for row in OLDER if row <= own)
        raise UserError(
            f"--as-capability {capability}: a GPU of capability {own[0]}.{own[1]} can run as "
            f"{names or 'itself only'}"
        )
    is_own = wanted == own
    arch, outer = 10 * wanted[0] + wanted[1], driver.get_current_target().arch
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(_own, capability=own))
        for owner, name, value in (
            (driver, "get_current_target", lambda: GPUTarget("cuda", arch, 32)),
            (torch.cuda, "get_device_capability", lambda device=None: wanted),
            (CompiledKernel, "_init_handles", _loader(capability, is_own)),
            (triton.compiler.compiler, "max_shared_mem", _max_shared_memory(capability, is_own)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_torch_compile_anew())
        _use_kernels_of(arch, instead_of=outer)
        stack.callback(_use_kernels_of, outer, instead_of=arch)
        yield _loaded[capability]


_own: dict[str, tuple[int, int]] = {}
"""the GPU's own capability, where a manager is open"""
_loaded: dict[str, list[LoadedKernel]] = defaultdict(list)
"""what this process has loaded as which capability"""
_init_handles = CompiledKernel._init_handles
_max_shared_mem = triton.compiler.compiler.max_shared_mem
_kernels: dict[int, dict[int, tuple[JITFunction, defaultdict]]] = defaultdict(dict)
"""what functions, by id, have compiled for an architecture that is not in use, by device"""


def _max_shared_memory(capability: str, is_own: bool) -> Callable[[int], int]:
    """The function gives what says to Triton how many bytes of shared memory a block may use."""
    return _max_shared_mem if is_own else lambda device: SHARED_MEMORY_LIMIT[capability]


def _loader(capability: str, is_own: bool) -> Callable[[CompiledKernel], None]:
    """The function gives what stands in for `CompiledKernel._init_handles`, which loads a kernel
    into the driver before its first launch."""

    def init_handles(kernel: CompiledKernel) -> None:
        if kernel.module is not None:
            return
        if not is_own:
            check_code(kernel.name, kernel.asm["ptx"], capability)
            # The driver reads to the first zero byte.
            kernel.kernel = kernel.asm["ptx"].encode() + b"\0"
        if is_own or kernel.metadata.shared > SHARED_MEMORY_LIMIT[capability]:
            _init_handles(kernel)
        else:
            _load_as_on(MULTIPROCESSORS[capability], kernel)
        _loaded[capability].append(_describe(kernel, capability))

    return init_handles


def _load_as_on(older: Multiprocessor, kernel: CompiledKernel) -> None:
    """The function loads a kernel with more shared memory than it uses, if that is what keeps more
    blocks from a multiprocessor than the older one has room for.

    `kernel.metadata` says what the kernel uses again afterwards.
    """
    metadata = kernel.metadata
    device = triton.runtime.driver.active.get_current_device()
    own = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    taken = shared_memory_to_take(older, metadata.shared, 32 * metadata.num_warps, own)
    loaded = metadata._replace(shared=taken)
    kernel.packed_metadata = make_backend(metadata.target).pack_metadata(loaded)
    with (
        mock.patch.object(kernel, "metadata", loaded),
        mock.patch.object(triton.compiler.compiler, "max_shared_mem", _max_shared_mem),
    ):
        _init_handles(kernel)


def shared_memory_to_take(older: Multiprocessor, shared: int, threads: int, own: int) -> int:
    """The function gives the shared memory of a block, bytes, with which a newer multiprocessor
    holds as many blocks as the older one, if it is shared memory that limits them there.

    Otherwise it is what the block uses: registers limit both alike, and of 16 blocks or 48 warps
    against 32 or 64 little is seen, less than of an L1 cache that has to make room.

    Args:
        older: the older multiprocessor.
        shared: what the block uses, bytes.
        threads: of the block.
        own: shared memory of the newer multiprocessor, bytes.
    """
    blocks = older.shared // (shared + RESERVED)
    if blocks >= min(older.blocks, older.threads // threads):
        return shared
    one_too_many = blocks + 1
    return max(shared, own // one_too_many + 1 - RESERVED)


def check_code(name: str, ptx: str, capability: str) -> None:
    """The function checks that a kernel is code that GPUs of `capability` can run.

    Too much shared memory it leaves to Triton, which raises `OutOfResources` as on such a GPU.

    Args:
        name: of the kernel.
        ptx: its code.
        capability: "8.6" or "8.0".

    Raises:
        WrongCodeError: it is not.
    """
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    wanted = f"sm_{capability.replace('.', '')}"
    if target is None or target[1] != wanted:
        found = "without a target" if target is None else f"for {target[1]}"
        raise WrongCodeError(f"{name} is compiled {found}, not for {wanted}")
    if "wgmma" in ptx:
        raise WrongCodeError(f"{name} multiplies with wgmma, which {capability} does not have")


def cubin_file(kernel: CompiledKernel) -> Path:
    """The function finds a kernel's binary in Triton's cache."""
    files = kernel.metadata_group.items()
    return next(Path(path) for name, path in files if name.endswith(".cubin"))


def _describe(kernel: CompiledKernel, capability: str) -> LoadedKernel:
    names = kernel.src.fn.arg_names
    constants = {
        names[path[0]]: getattr(value, "value", value)
        for path, value in kernel.src.constants.items()
        if len(path) == 1
    }
    return LoadedKernel(
        name=kernel.src.fn.__name__,
        capability=capability,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        max_registers=kernel.metadata.maxnreg,
        constexprs=constants,
        shared=kernel.metadata.shared,
        registers=kernel.n_regs,
        spills=kernel.n_spills,
        cubin=cubin_file(kernel),
    )


def _use_kernels_of(arch: int, *, instead_of: int) -> None:
    """The function gives every Triton function the kernels it has compiled for an architecture.

    A function finds its kernels by device only, and remembers the target it first compiled for.
    """
    if arch == instead_of:
        return
    for function in gc.get_objects():
        if type(function) is JITFunction:
            _kernels[instead_of][id(function)] = function, function.device_caches
            _, function.device_caches = _kernels[arch].pop(
                id(function), (function, defaultdict(function.create_binder))
            )


@contextlib.contextmanager
def _torch_compile_anew() -> Iterator[None]:
    """While it is open, `torch.compile` makes its kernels anew, and Triton loads them."""
    import torch._inductor.config
    from torch._inductor.runtime.hints import DeviceProperties

    def forget() -> None:
        torch._dynamo.reset()
        DeviceProperties.create.cache_clear()

    forget()
    # Its own launcher loads the binary from a file. The setting is part of the key of torch's cache
    # on disk, so code of different capabilities is kept apart there.
    with torch._inductor.config.patch(use_static_cuda_launcher=False):
        yield
    forget()
