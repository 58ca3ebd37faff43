"""Which configurations of the launch tables a GPU executed, of all that the compile gate compiles.

A configuration is what a launch table decides: a kernel's tile, warps, stages and registers a
thread. `pytest -m gpu --as-capability 8.6` fails unless its tests have executed each one.
"""

import importlib
import re
from collections.abc import Iterable

from bench.as_capability import LoadedKernel
from tests.kernels import compile_cases
from tests.kernels.compile_gate import CompileCase, ops

DECIDED = re.compile(r"BLOCK\w*|CHUNK|STAGES|(V_)?HEAD_SIZE|HEAD_DIM")
"""constexprs that a launch table decides, and the head sizes by which one is chosen"""


def configuration(kernel: CompileCase | LoadedKernel) -> str:
    """Say what a launch table decides of a kernel, the same for a case and for what is launched."""
    name = kernel.name if isinstance(kernel, LoadedKernel) else kernel.kernel.__name__
    tile = [
        f"{name}={getattr(value, 'value', value)}"
        for name, value in sorted(kernel.constexprs.items())
        if DECIDED.fullmatch(name)
    ]
    tile += [f"{kernel.num_warps} warps", f"{kernel.num_stages} stages"]
    if kernel.max_registers is not None:
        tile.append(f"{kernel.max_registers} registers at most")
    return f"{name.removesuffix('_kernel')}: {', '.join(tile)}"


def configurations(capability: str) -> set[str]:
    """All configurations of a row of the launch tables."""
    modules = (importlib.import_module(f"{compile_cases.__name__}.{op}") for op in ops())
    return {
        configuration(case)
        for module in modules
        for case in module.cases()
        if case.capability == capability
    }


class Executed:
    """The kernels that tests loaded, as text that travels between processes."""

    def __init__(self, loaded: list[LoadedKernel]) -> None:
        self.loaded = loaded
        self.seen = 0

    def since_last_call(self) -> list[tuple[str, str]]:
        """Each new kernel's configuration, and what it takes of the GPU at hand."""
        new = self.loaded[self.seen :]
        self.seen += len(new)
        return [
            (
                configuration(kernel),
                f"{kernel.registers} registers, {kernel.spills} spilled, {kernel.shared:,} bytes "
                "shared",
            )
            for kernel in new
        ]


def report(
    capability: str, executed: Iterable[tuple[str, list[tuple[str, str]]]]
) -> tuple[list[str], list[str]]:
    """Hold what tests executed against the launch tables.

    Args:
        capability: the tables' row.
        executed: tests, and what each was the first in its process to execute.

    Returns:
        A line a configuration that was executed; the configurations that were not.
    """
    first: dict[str, str] = {}
    for test, kernels in executed:
        for name, takes in kernels:
            first.setdefault(name, f"{name}; {takes}; {test}")
    wanted = configurations(capability)
    lines = [first[name] for name in sorted(wanted & first.keys())]
    return lines, sorted(wanted - first.keys())
