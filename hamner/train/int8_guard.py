"""The guard watches what quantisation loses, and gives operands that lose too much back to bf16.

Every step measures a sample of each int8 operand (hamner.kernels.int8_error), and the sums travel
to the host with the step's loss. What is above the limit is reported and falls back for good, two
steps later: by then every process has read the same sums, whatever its host's pace, so that all
change, and record their CUDA graphs anew, at the same step.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from hamner.kernels.int8_linear import OPERANDS
from hamner.model.int8 import LINEARS, Int8Linears, Operand

MAX_ERROR = 0.05
"""of an operand, relative, in the 2-norm"""
LAG = 2
"""steps from a measurement to the first step that it can change: the queue of hamner.train.log has
read it before that one is launched"""
SHOWN = 4
"""operands that a message names"""


class Int8Guard:
    """The guard of a run keeps the operands that fell back, from start to start.

    Args:
        int8: of the model; None: nothing is int8, and what fell back before is kept.
    """

    KEY = "int8_fallback"
    """of state.json: layer, linear layer, operand, first step"""

    def __init__(self, int8: Int8Linears | None) -> None:
        self.operands = [] if int8 is None else int8.operands
        self.fallen: dict[Operand, int] = {}
        """operand: the first step in bf16"""
        self.errors = torch.full((len(self.operands),), torch.nan)
        """of the last good step, relative; NaN for what is not quantised"""

    def judge(self, step: int, sums: Tensor) -> str | None:
        """The guard looks at a step's errors.

        Args:
            step: that measured them.
            sums: `StepResult.int8`, flat, on the CPU.

        Returns:
            A sentence about what falls back, if anything does.
        """
        lost, squares = sums.view(-1, 2).unbind(dim=1)
        self.errors = (lost / squares).sqrt()
        matmuls = {operand.matmul for operand in self.fallen}
        found = [
            self.operands[i]
            for i in (self.errors > MAX_ERROR).nonzero().flatten().tolist()
            if self.operands[i].matmul not in matmuls
        ]
        self.fallen |= dict.fromkeys(found, step + LAG)
        return self._sentence(found, step) if found else None

    def due(self, step: int) -> list[Operand]:
        """The method gives the operands that are bf16 in this step."""
        return [operand for operand, first in self.fallen.items() if first <= step]

    def describe(self) -> dict[str, dict[str, list[float | None]]] | None:
        """The method gives the metrics: error by linear layer, operand and layer, None where it is
        not quantised; None without int8."""
        if not self.operands:
            return None
        table: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
        for operand, error in zip(self.operands, self.errors.tolist(), strict=True):
            rounded = None if error != error else float(f"{error:.3g}")
            table[operand.linear][operand.name].append(rounded)
        return {
            linear: {name: row for name, row in rows.items() if any(e is not None for e in row)}
            for linear, rows in table.items()
        }

    def state_dict(self) -> dict:
        if not self.fallen:
            return {}
        return {self.KEY: [[*operand, first] for operand, first in self.fallen.items()]}

    def load_state_dict(self, state: dict) -> None:
        """The guard goes on where `state_dict` was taken.

        Raises:
            ValueError: it is not such a state.
        """
        self.fallen = {}
        for row in state.get(self.KEY, ()):
            match row:
                case [int(layer), str(linear), str(name), int(first)] if (
                    linear in LINEARS and name in OPERANDS
                ):
                    self.fallen[Operand(layer, linear, name)] = first
                case _:
                    raise ValueError(f"{self.KEY} has {row!r}")

    def _sentence(self, found: Sequence[Operand], step: int) -> str:
        errors = dict(zip(self.operands, self.errors.tolist(), strict=True))
        named = ", ".join(
            f"{o.name.replace('_', ' ')} of {o.linear} in layer {o.layer} ({errors[o]:.1%})"
            for o in sorted(found, key=lambda o: -errors[o])[:SHOWN]
        )
        more = f" and {len(found) - SHOWN} others" if len(found) > SHOWN else ""
        return (
            f"WARNING: int8 changes {named}{more} by more than {MAX_ERROR:.0%} at step {step:,}; "
            f"their matmuls are bf16 from step {step + LAG:,} on"
        )
