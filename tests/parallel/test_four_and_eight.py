"""Four and eight processes train as one does, take over each other's runs, and fail together."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.recipe import RECIPES
from hamner.config.sft import SftConfig
from hamner.config.train import ComputeConfig, RunConfig, TrainConfig
from hamner.data.batch import IGNORED_TARGET
from hamner.data.conversations.examples import load_examples
from hamner.data.conversations.loader import ConversationLoader
from hamner.errors import EXIT_BAD_INPUT, EXIT_FAILED
from hamner.parallel.engines import shard_axis
from hamner.parallel.ranks import Rank
from hamner.progress import SILENT
from hamner.sft.fine_tuning import fine_tune
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
MOVES = {
    "4 -> 8": ("fsdp", "muon"),
    "1 -> 8": ("ddp", "plan"),
    "1 -> 8, sharded": ("fsdp", "plan"),
    "8 -> 1": ("fsdp", "plan"),
    "8 -> 1, muon": ("fsdp", "muon"),
}
"""runs that change the number of processes, by engine and recipe"""
MIXTURE = {"num_experts": 4, "num_experts_per_token": 2}
"""fewer experts than processes: FSDP2 divides the rows of each"""
MIXTURE_STEPS = 6
MIXTURE_CASES = [("fsdp", "plan"), ("fsdp", "muon"), ("ddp", "plan")]
TUNED_STEPS = 4


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


def mixture(config: TrainConfig, run_dir: Path, engine: str) -> TrainConfig:
    """Each of eight processes accumulates two micro-batches."""
    return replace(
        config,
        model=replace(config.model, **MIXTURE),
        run_dir=run_dir,
        parallel=engine,
        batch_size=2 * ROWS,
        steps=MIXTURE_STEPS,
        eval_every=MIXTURE_STEPS // 2,
    )


def conversations(folder: Path, checkpoint: Path) -> SftConfig:
    """A row is filled by long questions or by long answers, of which only these are learned."""
    data = folder / "conversations.jsonl"
    with data.open("w") as file:
        for number in range(80):
            asked, answered = (40, 1) if number % 3 == 0 else (1, 1 + number % 12)
            turns = [
                ("user", "abcdefgh"[number % 8] * asked),
                ("assistant", "yes " * answered),
            ]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return replace(
        SftConfig.for_checkpoint(checkpoint),
        data=(str(data),),
        run_dir=folder / "tuned_one",
        steps=TUNED_STEPS,
        batch_size=ROWS,
        lr=1e-3,
        eval_every=2,
        compute=ComputeConfig(device="cpu", micro_batch_size=ROWS),
        run=RunConfig(log_every=1),
    )


def comparisons(config: TrainConfig, recipe: str) -> dict[tuple[int, str, str], TrainConfig]:
    """The function gives the run of one process and those of several, which stop before their end,
    by number of processes, engine and recipe."""
    folder = config.run_dir.parent
    one = replace(config, recipe=recipe, run_dir=folder / f"one_{recipe}", **RECIPES[recipe])
    several = {
        (size, engine, recipe): replace(
            one,
            run_dir=folder / f"{size}_{engine}_{recipe}",
            parallel=engine,
            stop_after=COMPARED,
        )
        for size in SIZES
        for engine in ("ddp", "fsdp")
    }
    return {(1, "none", recipe): one, **several}


class Runs:
    """All runs are there, by number of processes, engine and recipe: eight take over one that four
    began and one that a single process began, and a single process those that eight began. So are
    those of a mixture of experts and one of fine-tuning, of eight and of one."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.configs = {}
        for recipe in ("plan", "muon"):
            self.configs |= comparisons(eight_rows(folder), recipe)
            train(self.configs[1, "none", recipe])
        self.mixtures = {
            (engine, recipe): mixture(
                self.configs[1, "none", recipe], folder / f"mixture_{engine}_{recipe}", engine
            )
            for engine, recipe in (("auto", "plan"), ("auto", "muon"), *MIXTURE_CASES)
        }
        self.tuned_by_one = conversations(folder, self.configs[1, "none", "plan"].run_dir)
        self.tuned_by_eight = replace(
            self.tuned_by_one,
            run_dir=folder / "tuned_eight",
            compute=replace(self.tuned_by_one.compute, parallel="fsdp", micro_batch_size=1),
        )
        self.moved = {move: resumed(run, COMPARED) for move, run in self._begun().items()}
        self._train_together()
        for move in ("8 -> 1", "8 -> 1, muon"):
            train(self.moved[move])
        for recipe in ("plan", "muon"):
            train(self.mixtures["auto", recipe])
        fine_tune(self.tuned_by_one)

    def _begun(self) -> dict[str, TrainConfig]:
        """The method gives the runs that move, as those take them over who have not begun them."""
        begun = replace(
            self.configs[1, "none", "plan"], run_dir=self.folder / "begun", stop_after=COMPARED
        )
        train(begun)
        copied = shutil.copytree(begun.run_dir, self.folder / "begun_sharded")
        return {
            "4 -> 8": self.configs[4, *MOVES["4 -> 8"]],
            "1 -> 8": replace(begun, parallel="ddp"),
            "1 -> 8, sharded": replace(begun, parallel="fsdp", run_dir=copied),
            "8 -> 1": replace(self.configs[8, *MOVES["8 -> 1"]], parallel="auto"),
            "8 -> 1, muon": replace(self.configs[8, *MOVES["8 -> 1, muon"]], parallel="auto"),
        }

    def _train_together(self) -> None:
        """Four processes train, then eight, which take over runs of others too."""
        on_four, on_eight = ([self.configs[size, *case] for case in CASES] for size in SIZES)
        on_eight += [self.moved[move] for move in ("4 -> 8", "1 -> 8", "1 -> 8, sharded")]
        on_eight += [self.mixtures[case] for case in MIXTURE_CASES]
        train_together(on_four, 4, self.folder / "4")
        train_together([*on_eight, self.tuned_by_eight], 8, self.folder / "8")


def resumed(config: TrainConfig, step: int) -> TrainConfig:
    """The run goes on to its end from `step`; one that started over would stop before it, though
    its losses were the right ones."""
    return replace(config, resume=True, stop_after=STEPS - step)


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
    assert found[count - 1]["val_loss"] is not None


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


@pytest.mark.parametrize(("engine", "recipe"), MIXTURE_CASES)
def test_a_mixture_with_fewer_experts_than_processes_trains_as_in_one(engine, recipe, runs):
    one = metrics(runs.mixtures["auto", recipe].run_dir)
    eight = metrics(runs.mixtures[engine, recipe].run_dir)
    assert_same(one, eight, MIXTURE_STEPS)
    for expected, found in zip(one, eight, strict=True):
        assert found["router"]["load"] == [
            pytest.approx(layer, abs=1e-5) for layer in expected["router"]["load"]
        ]


@pytest.mark.parametrize("recipe", ["plan", "muon"])
def test_the_checkpoint_of_a_mixture_has_the_weights_of_one_process(recipe, runs):
    one, eight = (
        load_file(
            checkpoint.find(runs.mixtures[engine, recipe].run_dir / "checkpoints")[-1].path
            / checkpoint.MODEL_FILE
        )
        for engine in ("auto", "fsdp")
    )
    assert one.keys() == eight.keys()
    for name, weight in one.items():
        assert torch.allclose(eight[name], weight, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(
    ("shape", "shards", "axis"),
    [
        ((4, 3072, 768), 8, 1),  # of option c
        ((4, 768, 1536), 8, 1),
        ((4, 3072, 768), 4, 0),
        ((4, 3072, 768), 2, 0),
        ((4, 3074, 768), 8, 0),  # FSDP2 divides another axis than the first only evenly
        ((4, 768), 8, 0),
        ((49152, 768), 8, 0),
    ],
)
def test_experts_are_divided_evenly(shape, shards, axis):
    assert shard_axis(shape, shards) == axis


def test_fine_tuning_weighs_rows_by_their_targets(runs):
    """Eight processes, whose rows have unequal numbers of targets, have the losses of one that
    takes all rows at once."""
    config = runs.tuned_by_one.training()
    tokenizer = find_saved_model(config.sft.checkpoint).tokenizer
    sources = load_examples(config, tokenizer, SILENT)
    rows = next(ConversationLoader(sources, tokenizer, config)).targets != IGNORED_TARGET
    assert len(set(rows.sum(1).tolist())) > 3
    one, eight = metrics(runs.tuned_by_one.run_dir), metrics(runs.tuned_by_eight.run_dir)
    assert_same(one, eight, TUNED_STEPS)


def fail_in_last_rank(ports: list[int], config: TrainConfig, where: str, fault: str) -> None:
    """The function is the body of a process."""
    enter(ports)
    rank = Rank.read()
    on_phase = ignore_phase
    if rank.global_rank == rank.world_size - 1:
        late = faults.once_saved(config.run_dir / "checkpoints", getattr(faults, fault))
        on_phase = getattr(faults, where)(6, late)
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
    saved = checkpoint.find(config.run_dir / "checkpoints")
    for each in saved:
        each.verify()
    assert saved[-1].step >= 2
    # What is left is a run that one process finishes.
    train(resumed(replace(config, parallel="auto"), saved[-1].step))
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
