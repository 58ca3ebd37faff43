"""What ptxas made of a kernel is said by cuobjdump, which comes with Triton."""

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
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return int(match[1]), int(match[2])
