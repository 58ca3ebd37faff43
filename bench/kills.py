"""A run that is killed in a save, in an evaluation and in a step is compared with the run left in
peace.

    python -m bench.kills --option a --device cuda --kills 5
    python -m bench.kills --option tiny --device cpu --kills 5 --steps 60

Flags that are not its own go to `hamner.train`. The same steps are trained twice: in one process,
and in processes that are ended by SIGKILL and started again with `--resume`. Each kill waits for
its phase to begin, and for a random part of what the phase takes; where the process was then is
read from the diary it kept (`bench.watched_train`). The killed run must end with the same losses,
gradient norms, weights and optimizer state, bit for bit.
"""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from bench.restarts import RESULT_FILE, RestartedRun, is_same, make_output
from hamner.cli import FLAG_RULES, run_command
from hamner.errors import UserError

PHASES = ("save", "evaluation", "step")
"""each with a kill of its own"""
BY_CLOCK = "clock"
"""a kill in whatever the process does then"""
POLL_SECONDS = 0.002
MOST_OF_A_PHASE = 0.8
"""of its usual time, so that most kills still meet it"""


@dataclass(frozen=True)
class Kills:
    """Train under kills; compare with the undisturbed run."""

    kills: int = 5
    """at least 3: in a save, in an evaluation, in a step; further ones by the clock"""
    steps: int = 240
    """of either run; saved and evaluated ten times in between"""
    seed: int = 0
    """of the kills"""
    output: Path = Path("runs/kills")
    """folder; an earlier result in it is replaced"""


@dataclass(frozen=True)
class Span:
    """A span is a phase, from its first line in the diary to its last."""

    phase: str
    step: int
    begin: float
    end: float | None


@dataclass(frozen=True)
class Kill:
    """A kill says what a SIGKILL met."""

    wanted: str
    """phase it was meant for, or BY_CLOCK"""
    inside: list[str]
    """phases, with their steps, that had begun and not ended"""
    last_step: int
    """that had begun"""
    saved_step: int
    """from which the next start goes on"""

    def __str__(self) -> str:
        return (
            f"killed in {', '.join(self.inside) or 'none of the phases'} (meant: {self.wanted}), "
            f"{self.last_step:,} steps begun, {self.saved_step:,} of them saved"
        )


class Run(RestartedRun):
    """A run is one of the two; it keeps a diary of its phases, anew in each start."""

    def __init__(self, kills: Kills, name: str, flags: Sequence[str]) -> None:
        self.diary = kills.output / f"{name}_phases.txt"
        every = str(max(1, kills.steps // 10))
        own = [
            *("--steps", str(kills.steps), "--log-every", "1", "--sample-every", "0"),
            *("--save-every", every, "--eval-every", every, "--keep", "1"),
        ]
        super().__init__(
            kills.output, name, ["bench.watched_train", str(self.diary)], [*own, *flags]
        )

    def start(self, *flags: str) -> subprocess.Popen:
        """The method is `RestartedRun.start` with a new diary."""
        self.diary.unlink(missing_ok=True)
        return super().start(*flags)

    def finish(self) -> None:
        """The method trains to the end."""
        if self.start().wait():
            raise SystemExit(f"{self.folder} did not come to its end, see {self.output}")

    def spans(self) -> list[Span]:
        """The phases of the last start, in the order in which they began."""
        spans: dict[tuple[str, int], Span] = {}
        text = self.diary.read_text() if self.diary.exists() else ""
        for line in text.splitlines():
            phase, step, what, seconds = line.split()
            begin = float(seconds) if what == "begins" else spans[phase, int(step)].begin
            end = None if what == "begins" else float(seconds)
            spans[phase, int(step)] = Span(phase, int(step), begin, end)
        return list(spans.values())

    def wait_for(self, process: subprocess.Popen, condition: Callable[[], bool]) -> None:
        """The method waits while a start runs.

        Raises:
            SystemExit: it ended first.
        """
        while not condition():
            if process.poll() is not None:
                raise SystemExit(
                    f"a start ended before its kill, see {self.output}; with more --steps there "
                    "is more to be killed in"
                )
            time.sleep(POLL_SECONDS)

    def last_step(self) -> int:
        """The method gives the last step that began in the last start."""
        return max((span.step for span in self.spans() if span.phase == "step"), default=0)

    def is_in(self, phase: str, step: int) -> bool:
        """The method says whether a phase goes on that began at a step or later."""
        return any(
            span.phase == phase and span.step >= step and span.end is None for span in self.spans()
        )


def typical_seconds(run: Run) -> dict[str, float]:
    """The function times of each phase that three in four took at least."""
    seconds: dict[str, list[float]] = {}
    for span in run.spans():
        seconds.setdefault(span.phase, []).append(span.end - span.begin)
    return {phase: sorted(times)[len(times) // 4] for phase, times in seconds.items()}


def kill(run: Run, wanted: str, step: int, seconds: float) -> Kill:
    """The function starts the run and kills it.

    Args:
        run: of which all kills but the first are to leave a checkpoint.
        wanted: phase to be killed in, or BY_CLOCK.
        step: the first at which it may be.
        seconds: after the phase, or for BY_CLOCK a step, began.
    """
    is_first = not run.output.exists()
    process = run.start()
    try:
        run.wait_for(process, lambda: run.last_step() >= step and (is_first or run.saved_step > 0))
        step = run.last_step()
        phase = "step" if wanted == BY_CLOCK else wanted
        run.wait_for(process, lambda: run.is_in(phase, step))
        time.sleep(seconds)
    finally:
        process.kill()
        process.wait()
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"a start ended before its kill, see {run.output}")
    inside = [f"{span.phase} {span.step}" for span in run.spans() if span.end is None]
    return Kill(wanted, inside, run.last_step(), run.saved_step)


def train_killed(run: Run, kills: Kills, typical: Mapping[str, float]) -> list[Kill]:
    """The run is killed as often as asked, and until each phase had its own; then it trains to the
    end."""
    chance = random.Random(kills.seed)
    moments = [*PHASES, *[BY_CLOCK] * (kills.kills - len(PHASES))]
    chance.shuffle(moments)
    between, made = kills.steps // (kills.kills + 1), []
    while moments:
        wanted = moments[0]
        longest = between * typical["step"] if wanted == BY_CLOCK else typical[wanted]
        step = between * (kills.kills - len(moments) + 1)
        made.append(kill(run, wanted, step, chance.uniform(0, MOST_OF_A_PHASE * longest)))
        print(made[-1], flush=True)
        if wanted == BY_CLOCK or any(inside.startswith(wanted) for inside in made[-1].inside):
            moments.pop(0)
    run.finish()
    return made


def main(kills: Kills, flags: Sequence[str]) -> int:
    """The command runs both and prints what the kills met and whether the runs are the same; it
    returns 1 if not."""
    if kills.kills < len(PHASES) or kills.steps < 2 * kills.kills:
        raise UserError("give at least 3 --kills, and at least twice as many --steps")
    make_output(kills.output, ("undisturbed", "killed"))
    started = time.monotonic()
    undisturbed, killed = Run(kills, "undisturbed", flags), Run(kills, "killed", flags)
    undisturbed.finish()
    typical = typical_seconds(undisturbed)
    print(
        f"undisturbed: {kills.steps:,} steps in {time.monotonic() - started:.0f} s; a quarter of "
        "each phase was faster than: "
        + ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in typical.items()),
        flush=True,
    )
    started = time.monotonic()
    made = train_killed(killed, kills, typical)
    print(f"killed {len(made)} times: {kills.steps:,} steps in {time.monotonic() - started:.0f} s")
    same = is_same(undisturbed, killed)
    result = {"same": same, "kills": [asdict(one) for one in made]}
    (kills.output / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    how = {"return_unknown_args": True, "registry": FLAG_RULES, "prog": "python -m bench.kills"}
    run_command(lambda args: main(*tyro.cli(Kills, args=args, **how)))
