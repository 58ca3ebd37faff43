"""`python -m hamner.checkpoint import OLD.pt` works on checkpoints from the command line."""

from collections.abc import Sequence

from hamner.checkpoint import import_pt
from hamner.cli import run_command
from hamner.errors import UserError


def main(args: Sequence[str]) -> int:
    """The command hands what follows `import` to `import_pt.main` and returns its exit code.

    Raises:
        UserError: the first word is not `import`.
    """
    if args[:1] in (["--help"], ["-h"]):
        print(f"{__doc__}\n\nusage: python -m hamner.checkpoint import --help")
        return 0
    if args[:1] != ["import"]:
        raise UserError(
            "python -m hamner.checkpoint takes `import`: python -m hamner.checkpoint import OLD.pt"
        )
    return import_pt.main(args[1:])


if __name__ == "__main__":
    run_command(main)
