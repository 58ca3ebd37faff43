"""What ptxas made of a kernel is said by cuobjdump and nvdisasm, which come with Triton."""

import re
import subprocess
from pathlib import Path

import triton


def registers_and_stack(cubin: Path) -> tuple[int, int]:
    """The function gives a compiled kernel's registers a thread and bytes of stack a thread.

    No kernel of the project has local arrays, so a stack holds spilled registers.

    Raises:
        RuntimeError: cuobjdump says neither.
    """
    usage = _output_of("cuobjdump", "--dump-resource-usage", cubin)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return int(match[1]), int(match[2])


def instructions(cubin: Path) -> tuple[str, ...]:
    """The function gives the kinds of a kernel's instructions: IMMA.16832.S8.S8, LDS.U8."""
    text = _output_of("nvdisasm", "-c", cubin)
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    return tuple(sorted(set(names)))


def _output_of(tool: str, flag: str, cubin: Path) -> str:
    command = [getattr(triton.knobs.nvidia, tool).path, flag, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
