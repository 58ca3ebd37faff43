"""Compiles kernels for GPUs this machine does not have, and checks that they fit.

Kernels tuned on one card fail at first launch on a smaller one: too much shared memory, or
registers spilled to memory. ptxas says both before there is any GPU to ask. Each op lists what it
launches in `tests/kernels/compile_cases/<op>.py` as `cases() -> list[CompileCase]`, every row of
its launch table at the real training shapes.

Run by hand (TRITON_INTERPRET must be unset), for all ops or for those named:

    python -m tests.kernels.compile_gate [op ...]
"""

import contextlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.as_capability import SHARED_MEMORY_LIMIT, cubin_file
from bench.cubin import instructions, registers_and_stack
from tests.kernels import compile_cases

ONE_BY_ONE = "-"
"""the argument with which ops are read from the standard input, and an empty line ends each"""


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one launch configuration.

    Args:
        name: what is compiled, unique within its op, e.g. "rms_norm_forward/D=1024".
        kernel: the `@triton.jit` function.
        signature: the type of every parameter that is not constexpr: "*bf16", "*fp32", "i32"..., or
            a tuple of types; None for what is not given, which becomes a constexpr. Pointers are
            taken as 16-byte aligned, as torch's allocations are.
        constexprs: the value of every constexpr parameter.
        num_warps: warps a block.
        capability: the launch table row: "8.6", "8.0" or "9.0".
        num_stages: software pipelining stages; 3 is Triton's, where a launch does not say.
        divisible_by_16: integer parameters that are multiples of 16 at this shape; Triton
            specialises on that at launch, and vectorises with it.
        max_registers: a thread may use; None leaves it to the compiler.
        fp_fusion: whether a product and a sum may become one instruction.
        disassembles: whether the result has the machine's instructions.
    """

    name: str
    kernel: JITFunction
    signature: dict[str, str | tuple[str, ...] | None]
    constexprs: dict[str, object]
    num_warps: int
    capability: str
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()
    max_registers: int | None = None
    fp_fusion: bool = True
    disassembles: bool = False


@dataclass(frozen=True)
class CompileResult:
    """What a case became: registers a thread, bytes of stack and of shared memory, matmuls, the
    layouts of the tiles that it sums up, which decide the order of the sums, and the names of its
    instructions with their modifiers, if asked for."""

    name: str
    capability: str
    registers: int
    stack: int
    shared: int
    uses_tensor_cores: bool = False
    summed: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()

    def row(self, op: str) -> str:
        """A line of the table that the tests print."""
        return (
            f"{op:<17} {self.name:<58} {self.capability}  {self.registers:>3} registers "
            f"{self.shared:>7,} bytes shared {self.stack:>4} spilled"
        )

    def problems(self) -> list[str]:
        """Say why this kernel must not ship; empty when it may."""
        found = []
        limit = SHARED_MEMORY_LIMIT[self.capability]
        if self.shared > limit:
            found.append(f"{self.shared:,} bytes of shared memory, at most {limit:,}")
        if self.stack > 0:
            # No kernel here has local arrays, so a stack frame holds spilled registers.
            found.append(f"spills: a stack frame of {self.stack} bytes")
        return [f"{self.name} on {self.capability}: {problem}" for problem in found]


def compile_case(case: CompileCase) -> CompileResult:
    """Compile one case to a cubin.

    Raises:
        ValueError: the signature and constexprs do not cover the kernel's parameters exactly.
    """
    names = case.kernel.arg_names
    given = [*case.signature, *case.constexprs]
    if sorted(given) != sorted(names):
        raise ValueError(
            f"{case.name}: signature and constexprs must name each parameter once; "
            f"wrong: {sorted(set(given) ^ set(names)) or 'a name given twice'}"
        )
    signature = {name: case.signature.get(name) or "constexpr" for name in names}
    absent = dict.fromkeys(name for name, kind in case.signature.items() if kind is None)
    attrs = {
        path: [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        for path, kind in _leaves((i,), signature[name])
        if kind.startswith("*") or name in case.divisible_by_16
    }
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constexprs=absent | case.constexprs, attrs=attrs),
        target=GPUTarget("cuda", int(case.capability.replace(".", "")), 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "maxnreg": case.max_registers,
            "enable_fp_fusion": case.fp_fusion,
        },
    )
    cubin = cubin_file(compiled)
    registers, stack = registers_and_stack(cubin)
    return CompileResult(
        case.name,
        case.capability,
        registers,
        stack,
        shared=compiled.metadata.shared,
        # mma.sync or wgmma.mma_async
        uses_tensor_cores="mma" in compiled.asm["ptx"],
        summed=_summed(compiled.asm["ttgir"]),
        instructions=instructions(cubin) if case.disassembles else (),
    )


def _summed(ttgir: str) -> tuple[str, ...]:
    """The function finds the layouts of the fp32 tiles that a kernel sums over an axis."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    tiles = re.findall(r"\}\) : \(tensor<([\dx]+)xf32, (#\w+)>\) ->", ttgir)
    return tuple(f"{shape} {layouts[name]}" for shape, name in tiles)


def _leaves(path: tuple[int, ...], kind: str | tuple) -> Iterator[tuple[tuple[int, ...], str]]:
    """The function yields the parameter's type, or each type of a tuple, with where it stands."""
    if isinstance(kind, str):
        yield path, kind
    else:
        yield from (((*path, i), member) for i, member in enumerate(kind))


def ops() -> list[str]:
    """The ops that have compile cases."""
    return sorted(module.name for module in pkgutil.iter_modules(compile_cases.__path__))


def compile_op(op: str) -> Iterator[CompileResult]:
    """Compile every case of an op."""
    for case in importlib.import_module(f"{compile_cases.__name__}.{op}").cases():
        yield compile_case(case)


@contextlib.contextmanager
def compiler() -> Iterator[Callable[[str], list[CompileResult]]]:
    """While it is open, a function compiles every case of an op in a process that has no
    TRITON_INTERPRET, the same for all ops.

    Under the interpreter `@triton.jit` makes functions that cannot be compiled, so the test
    process, which sets it where there is no GPU, cannot compile.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compile_gate", ONE_BY_ONE],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

        def compile_there(op: str) -> list[CompileResult]:
            with contextlib.suppress(BrokenPipeError):  # what ended it is in its errors
                print(op, file=process.stdin, flush=True)
            results = []
            for line in process.stdout:
                if not line.strip():
                    return results
                results.append(CompileResult(**json.loads(line)))
            errors.seek(0)
            raise RuntimeError(f"compiling {op} failed:\n{errors.read()}")

        with process:
            yield compile_there
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


if __name__ == "__main__":
    is_one_by_one = sys.argv[1:] == [ONE_BY_ONE]
    for name in map(str.strip, sys.stdin) if is_one_by_one else sys.argv[1:] or ops():
        for result in compile_op(name):
            print(json.dumps(asdict(result)), flush=True)
        if is_one_by_one:
            print(flush=True)
