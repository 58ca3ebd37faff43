"""Memory over a step is shown by kind, from the allocations in its trace.

What an allocation is for shows in when it is made and when it is given back:

    made in         given back in       kind
    before          later or never      weights and optimizer state
    forward         a later phase       activations: kept for the backward pass, logits' gradients
    backward        a later phase       gradients
    any phase       the same            temporary
"""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from hamner.files import figure_bytes, write_output
from hamner.profile.trace import Trace

KINDS = ("weights", "optimizer state", "held before", "gradients", "activations", "temporary")


@dataclass(frozen=True)
class MemoryTimeline:
    """A timeline has the bytes by kind after every allocation and every release."""

    milliseconds: list[float]
    """since the first event"""
    kinds: dict[str, list[int]]
    """bytes of each of KINDS at these times"""
    phases: list[tuple[str, float]]
    """phase, millisecond at which it begins"""

    @property
    def peak(self) -> dict[str, int]:
        """The property gives the bytes by kind at the moment when they were most together."""
        totals = [sum(sizes) for sizes in zip(*self.kinds.values(), strict=True)]
        moment = totals.index(max(totals))
        return {kind: sizes[moment] for kind, sizes in self.kinds.items() if sizes[moment]}


def memory_timeline(trace: Trace) -> MemoryTimeline | None:
    """The function follows the memory of a trace; None without `profile_memory=True`."""
    events = trace.memory
    if not events:
        return None
    made: dict[int, int] = {}
    changes: list[dict[str, int]] = [{} for _ in events]
    for position, event in enumerate(events):
        if event.size > 0:
            made[event.address] = position
        elif event.address in made:
            begin = made.pop(event.address)
            kind = _kind(trace.phase_at(events[begin].time), trace.phase_at(event.time))
            changes[begin] = {kind: events[begin].size}
            changes[position] = {kind: -events[begin].size}
        else:
            changes[position] = {"held before": event.size}
    for begin in made.values():
        changes[begin] = {_kind(trace.phase_at(events[begin].time), None): events[begin].size}

    before, start, kinds = _before(trace), events[0].time, {}
    for kind in KINDS:
        sizes = accumulate((c.get(kind, 0) for c in changes), initial=before.get(kind, 0))
        kinds[kind] = list(sizes)[1:]
    return MemoryTimeline(
        milliseconds=[(event.time - start) / 1e3 for event in events],
        kinds=kinds,
        phases=[(r.name, (r.start - start) / 1e3) for r in trace.phases],
    )


def _kind(made: str | None, given_back: str | None) -> str:
    if made == given_back:
        return "temporary"
    if made == "forward":
        return "activations"
    return "gradients" if made in ("backward", "accumulate") else "temporary"


def _before(trace: Trace) -> dict[str, int]:
    """Weights and state were held when the trace began, as far as the capture says so."""
    first = trace.memory[0]
    held = first.allocated - first.size if first.allocated else 0
    weights = trace.metadata.get("weight_bytes", 0)
    state = trace.metadata.get("optimizer_bytes", 0)
    return {
        "weights": weights,
        "optimizer state": state,
        "held before": max(0, held - weights - state),
    }


def draw(timeline: MemoryTimeline, path: Path) -> None:
    """The function writes the timeline as a PNG.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = {kind: sizes for kind, sizes in timeline.kinds.items() if any(sizes)}
    axes.stackplot(
        timeline.milliseconds,
        [[size / 2**30 for size in sizes] for sizes in drawn.values()],
        labels=list(drawn),
        step="post",
    )
    top = axes.get_ylim()[1]
    for phase, begin in timeline.phases:
        axes.axvline(begin, color="black", linewidth=0.5, alpha=0.5)
        if phase in ("forward", "backward"):  # the others are too short for a label
            axes.text(begin, top, f" {phase}", rotation=90, va="top", fontsize=7)
    axes.set(xlabel="ms since the step began, on the CPU's clock", ylabel="GiB allocated")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    write_output(path, figure_bytes(figure))
