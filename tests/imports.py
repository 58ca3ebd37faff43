"""Commands that only print must start without the seconds of importing what computes."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence


def output_without(modules: Sequence[str], *command: str) -> str:
    """Run `python -m COMMAND` from nothing, assert that it imports none of these modules, and give
    what it prints."""
    result = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert result.returncode == 0, result.stderr
    imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.MULTILINE))
    assert "hamner" in imported
    assert not imported.intersection(modules)
    return result.stdout
