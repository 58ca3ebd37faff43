"""Four and eight processes train as one does, take over each other's runs, and fail together."""

import re
from dataclasses import replace

import pytest

from hamner.checkpoint import format as checkpoint
from hamner.config.recipe import RECIPES
from hamner.config.train import TrainConfig
from hamner.errors import EXIT_BAD_INPUT, EXIT_FAILED
from hamner.parallel.ranks import Rank
from hamner.train.loop import train
from hamner.train.step import ignore_phase
from tests.corpus import write_predictable
from tests.parallel import faults
from tests.parallel.jobs import enter, run_job, said, train_together
from tests.train.test_loop import metrics, small_config

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.timeout(300)]

ROWS = 8
"""of a step: one for each of eight processes, two for each of four"""
COMPARED, STEPS = 10, 13
"""steps that are taken before a run moves to another number of processes, and all of a run"""
CASES = [(engine, recipe) for recipe in ("plan", "muon") for engine in ("ddp", "fsdp")]
SIZES = (4, 8)
MOVES = {"4 -> 8": ("fsdp", "muon"), "1 -> 8": ("ddp", "plan"), "8 -> 1": ("fsdp", "plan")}
"""runs that change the number of processes, by engine and recipe"""


def eight_rows(folder, **changes) -> TrainConfig:
    """Three documents and three rows of validation: fewer than processes that share them."""
    data = write_predictable(folder / "few.jsonl", documents=3, length=3_000)
    config = small_config(folder)
    return replace(
        config,
        model=replace(config.model, num_layers=1),
        data=(str(data),),
        batch_size=ROWS,
        micro_batch_size=1,
        steps=STEPS,
        val_fraction=0.4,
        eval_tokens=3 * 64,
        eval_every=COMPARED,
        log_every=1,
        lr=1e-3,
        **changes,
    )


class Runs:
    """All runs are there, by number of processes, engine and recipe: eight take over one that four
    began and one that a single process began, and a single process one that eight began."""

    def __init__(self, folder) -> None:
        config = eight_rows(folder)
        self.configs = {}
        for recipe in ("plan", "muon"):
            own = replace(
                config, recipe=recipe, run_dir=folder / f"one_{recipe}", **RECIPES[recipe]
            )
            self.configs[1, "none", recipe] = own
            for size, engine in ((size, engine) for size in SIZES for engine in ("ddp", "fsdp")):
                run_dir = folder / f"{size}_{engine}_{recipe}"
                several = replace(own, run_dir=run_dir, parallel=engine, stop_after=COMPARED)
                self.configs[size, engine, recipe] = several
            train(own)
        begun = replace(
            self.configs[1, "none", "plan"], run_dir=folder / "begun", stop_after=COMPARED
        )
        train(begun)
        self.moved = {
            "4 -> 8": resumed(self.configs[4, *MOVES["4 -> 8"]]),
            "1 -> 8": resumed(replace(begun, parallel="ddp")),
            "8 -> 1": resumed(self.configs[8, *MOVES["8 -> 1"]]),
        }
        for size in SIZES:
            runs = [self.configs[size, *case] for case in CASES]
            if size == 8:
                runs += [self.moved["4 -> 8"], self.moved["1 -> 8"]]
            train_together(runs, size, folder / str(size))
        train(self.moved["8 -> 1"])


def resumed(config: TrainConfig) -> TrainConfig:
    """The run goes on to its end."""
    return replace(config, resume=True, stop_after=None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def assert_same(expected: list[dict], found: list[dict], count: int) -> None:
    """The first `count` steps agree to rounding: gradients are added in another order."""
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    assert len(found) >= count
    for one, other in zip(expected[:count], found[:count], strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            close = one[name] and pytest.approx(one[name], rel=1e-6)
            assert other[name] == close, (name, other["step"])
        assert other["tokens"] == one["tokens"]
    assert found[COMPARED - 1]["val_loss"] is not None


@pytest.mark.parametrize(("engine", "recipe"), CASES)
@pytest.mark.parametrize("size", SIZES)
def test_they_have_the_losses_of_one_process_that_accumulates(size, engine, recipe, runs):
    one = metrics(runs.configs[1, "none", recipe].run_dir)
    several = metrics(runs.configs[size, engine, recipe].run_dir)
    assert_same(one, several, COMPARED)
    assert one[0]["loss"] - one[COMPARED - 1]["loss"] > 0.05  # or nothing would have been compared


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_with_another_number_of_processes(move, runs):
    _, recipe = MOVES[move]
    one = metrics(runs.configs[1, "none", recipe].run_dir)
    assert_same(one, metrics(runs.moved[move].run_dir), STEPS)


def fail_in_last_rank(ports: list[int], config: TrainConfig, where: str, fault: str) -> None:
    """The function is the body of a process."""
    enter(ports)
    rank = Rank.read()
    is_last = rank.global_rank == rank.world_size - 1
    on_phase = getattr(faults, where)(6, getattr(faults, fault)) if is_last else ignore_phase
    train(config, on_phase=on_phase)


def errors(output, count: int) -> list[str]:
    return [line for line in said(output, count).splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("where", "fault", "cause"),
    [
        ("in_step", "die", r"rank 7 on \S+ is dead \(killed, .*\); rank \d was in step [67];"),
        ("before_step", "hang", r"no step for 0\.1 minutes: rank 7 on \S+ is at .* in step 6;"),
    ],
)
def test_eight_end_with_one_sentence_that_names_the_rank(where, fault, cause, runs, tmp_path):
    config = eight_rows(tmp_path, parallel="ddp", save_every=2, keep=0, hang_minutes=0.1)
    codes = run_job(fail_in_last_rank, 8, tmp_path / "out", config, where, fault)
    assert set(codes[:-1]) == {EXIT_FAILED}
    assert codes[-1] == (-9 if fault == "die" else EXIT_FAILED)
    (error,) = errors(tmp_path / "out", 8)
    assert re.match(f"error: {cause} the job ends; the last checkpoint is whole", error)
    for saved in checkpoint.find(config.run_dir / "checkpoints"):
        saved.verify()
    # What is left is a run that one process finishes.
    train(resumed(replace(config, parallel="auto")))
    stayed = metrics(runs.configs[1, "none", "plan"].run_dir)
    assert_same(stayed, metrics(config.run_dir), STEPS)


def test_what_eight_cannot_share_is_refused_in_one_sentence(tmp_path):
    """Rank 0 finds it, and every rank leaves with the exit code of bad input."""
    config = replace(eight_rows(tmp_path), batch_size=12)
    codes = run_job(train_once, 8, tmp_path / "out", config)
    assert codes == [EXIT_BAD_INPUT] * 8
    (error,) = errors(tmp_path / "out", 8)
    assert re.fullmatch(
        r"error: rank 0 on \S+: --batch-size 12 is shared by all GPUs and must be a multiple of "
        r"their number, 8: try --batch-size 16",
        error,
    )
    assert not config.run_dir.exists()


def train_once(ports: list[int], config: TrainConfig) -> None:
    """The function is the body of a process."""
    enter(ports)
    train(config)
