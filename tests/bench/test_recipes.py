"""Recipes are compared: what is tried next, runs that are left and gone on with, the statistics."""

import fcntl
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import recipe_chat, recipe_report, recipe_trials, recipes
from bench.recipe_fit import SEVERAL_SEEDS, fit
from bench.recipe_report import report
from bench.recipe_statistics import Ratio, tokens_at, trend
from bench.recipe_trials import LEAST_TRIALS, START, Scope, Trial, plan, tuned
from hamner.errors import UserError
from hamner.sft.fine_tuning import fine_tune
from hamner.train import evaluation
from tests.corpus import write_predictable
from tests.models import DENSE, build
from tests.saved import save_run

TUNE = Scope("tune", ("adamw", "muon"), (20_000_000,), (0,))
LADDER = Scope("ladder", ("plan", "adamw", "muon"), (25_000_000, 50_000_000, 100_000_000), (0, 1))
SMALL = (
    *("--option", "tiny", "--hidden-size", "64", "--num-layers", "1", "--num-attention-heads", "4"),
    *("--num-kv-heads", "2", "--expert-intermediate-size", "128", "--vocab-size", "261"),
    *("--max-seq-len", "64", "--seq-len", "64", "--batch-size", "2", "--device", "cpu"),
)

TALKING = replace(DENSE, vocab_size=261, max_seq_len=512)


def result(trial: Trial, loss: float | None, **more) -> dict:
    """The line of a run that was not made."""
    return {
        **vars(trial),
        "val_loss": loss,
        "bits_per_byte": None if loss is None else loss / 3,
        "diverged": loss is None,
        "tokens_per_second": 400_000 if trial.arm != "muon" else 380_000,
        "seconds": 50.0,
        "steps": 1000,
        "batch_size": 24,
        "seq_len": 1024,
        "parameters": 59_000_000,
        "data": {
            "digest": "0",
            "train_tokens": 112_000_000,
            "validation_tokens": 700_000,
            "validation_bytes": 3_100_000,
            "epochs": 0.2,
        },
        "curve": [[trial.tokens // 2, 5.0, None], [trial.tokens, 4.5, loss]],
        "conditions": {"gpu": "X"},
        **more,
    }


def search(loss_at, scope: Scope = TUNE, results=()) -> list[dict]:
    """The results of a search whose losses follow from the point."""
    results = list(results)
    while todo := plan(scope, results):
        results.append(result(todo[0], loss_at(todo[0].arm, todo[0].point)))
    return results


def bowl(arm: str, point) -> float | None:
    """The best of adamw is a step away, of muon several; large learning rates diverge."""
    best = {"adamw": (0, 0, 1, 0), "muon": (2, -1, 0, 2)}[arm]
    if point[0] > 3:
        return None
    return 4.0 + sum((a - b) ** 2 for a, b in zip(point, best, strict=True))


def test_a_search_ends_inside_and_gives_every_arm_as_many_trials():
    results = search(bowl)
    by_arm = {arm: [r for r in results if r["arm"] == arm] for arm in TUNE.arms}
    counts = {arm: len(own) for arm, own in by_arm.items()}
    assert counts["adamw"] == counts["muon"] >= LEAST_TRIALS
    for arm, own in by_arm.items():
        points = [r["point"] for r in own]
        assert points[0] == START
        assert len(set(points)) == len(points)
        best = min(own, key=recipe_trials.loss_of)
        assert best["val_loss"] == 4.0, arm
        for number, value in enumerate(best["point"]):
            tried = [point[number] for point in points]
            assert min(tried) < value < max(tried), (arm, recipe_trials.DIMENSIONS[number])


def test_a_search_tells_the_learning_rate_first_and_does_not_wander():
    """The less weight decay the better, by less than a seed: nobody goes on and on for that."""

    def flat(arm: str, point) -> float:
        return 4.0 + (point[0] - 1) ** 2 + point[1] ** 2 + 0.004 * point[2] - 0.004 * point[3]

    results = search(flat)
    points = [r["point"] for r in results if r["arm"] == "muon"]
    assert points[:3] == [START, (1, 0, 0, 0), (2, 0, 0, 0)]
    assert [point[1] for point in points[3:5]] == [1, -1]
    assert points[5:9] == [(1, 0, 1, 0), (1, 0, -1, 0), (1, 0, 0, 1), (1, 0, 0, -1)]
    # Its neighbours were all tried: beside it in several dimensions at once.
    assert len(points) == LEAST_TRIALS
    assert all(max(abs(a - b) for a, b in zip(p, points[1], strict=True)) == 1 for p in points[9:])
    assert recipe_trials.best_of(results, "tune", "muon")["point"] == points[1]


def test_beta2_stays_below_one():
    falling = search(lambda arm, point: 4.0 - point[3])
    assert max(r["beta2"] for r in falling) == 0.9998
    assert min(r["beta2"] for r in search(lambda arm, point: 4.0 + point[3])) == 0.2
    assert plan(TUNE, falling) == []


def test_a_search_goes_on_from_lines_in_any_session():
    results = search(bowl)
    read = [json.loads(json.dumps(line)) for line in results]
    for done in range(0, len(read), 5):
        assert plan(TUNE, read[:done])[0].key == Trial.of(results[done]).key
    assert plan(TUNE, read) == []


def test_a_search_that_diverges_lowers_the_learning_rate():
    point = recipe_trials.next_point({START: math.inf}, START, recipe_trials.DIMENSIONS)
    assert point == (-1, 0, 0, 0)


def test_the_learning_rate_is_chosen_again_on_current_and_the_ladder_has_it():
    current = Scope("current", ("adamw", "muon"), (25_000_000,), (0,))
    with pytest.raises(UserError, match="no result of adamw in the part `tune`"):
        plan(current, [])
    tune = search(bowl)
    with pytest.raises(UserError, match="no result of muon in the part `current`"):
        plan(LADDER, tune)

    def finer(arm, point):
        return abs(point[0] - {"adamw": 0, "muon": 1}[arm])

    results = search(finer, current, tune)
    points = [r["point"] for r in results if (r["part"], r["arm"]) == ("current", "muon")]
    assert points == [(2, -1, 0, 2), (3, -1, 0, 2), (1, -1, 0, 2), (0, -1, 0, 2)]
    ladder = plan(LADDER, results)
    assert {t.lr for t in ladder if t.arm == "muon"} == {tuned((1, -1, 0, 2), "muon")["lr"]}
    assert {t.lr for t in ladder if t.arm == "plan"} == {2e-4}
    assert len(ladder) == 2 * (3 * 3 + 2)
    assert [t.tokens for t in ladder] == sorted(t.tokens for t in ladder)
    assert not {t.seed for t in ladder} & {recipe_trials.TUNING_SEED}
    one_length = plan(Scope("ladder", ("muon",), (50_000_000,), (0,)), results)
    assert [t.tokens / 1e6 for t in one_length] == [12.5, 25, 50]


def test_runs_of_other_flags_have_other_names():
    """Or a run that was left would go on by flags that it was not begun with."""
    trial = Trial("ladder", "muon", 0, 50_000_000, 2e-3, 6e-3, 0.3, 0.9875, None, LADDER.flags)
    assert trial.name == "ladder-muon-50M-lr0.002-e0.006-wd0.3-b0.9875-seed0"
    others = [replace(trial, flags=(*trial.flags, "--momentum", value)) for value in "01"]
    assert len({other.name for other in [trial, *others]}) == 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train, other = folder / "train.jsonl", folder / "all.jsonl"
    write_predictable(other, documents=70)
    lines = other.read_text().splitlines(keepends=True)
    train.write_text("".join(lines[:60]))
    valid = folder / "valid.jsonl"
    valid.write_text("".join(lines[60:]))
    return ["--data", str(train), "--validation", str(valid)]


def test_runs_are_trained_left_and_gone_on_with(data, tmp_path, capsys, monkeypatch):
    """The long pair on a minute model: one call ends in the middle of a run."""
    monkeypatch.setitem(recipes.RESERVE_SECONDS, "long", 0.0)
    monkeypatch.setattr(recipes, "START_SECONDS", 0.0)
    tune = [result(t, 4.0) for t in plan(TUNE, [])]
    known = tmp_path / "known"
    known.mkdir()
    current = [{**line, "part": "current"} for line in tune]
    (known / "current.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in current))
    command = ["long", *data, "--output", str(tmp_path / "out"), "--known", str(known)]
    command += ["--tokens", "1536", *SMALL]
    steps = itertools.count(1)
    late = SimpleNamespace(monotonic=lambda: math.inf if next(steps) == 4 else 0.0)
    monkeypatch.setattr(recipes.runs, "time", late)
    assert recipes.main(command) == 0
    assert "long: 2 or more runs are left" in capsys.readouterr().out
    assert recipes.read_results(tmp_path / "out") == []
    assert next(steps) == 5
    assert recipes.main(command) == 0
    plain, muon = recipes.read_results(tmp_path / "out")
    assert (plain["arm"], muon["arm"], muon["recipe"]["optimizer"]) == ("plan", "muon", "muon")
    for line in (plain, muon):
        assert line["steps"] == line["curve"][-1][0] // 128 == 12
        # The loss is where it was measured, and at the end.
        assert [tokens // 128 for tokens, _, loss in line["curve"] if loss] == [5, 10, 12]
        assert line["curve"][-1][2] == pytest.approx(line["val_loss"], abs=1e-4)
        # One byte a token, but for the ends of documents.
        share = line["data"]["validation_tokens"] / line["data"]["validation_bytes"]
        assert 1 < share < 1.01
        assert line["bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2) * share, 1e-4)
        assert line["recipe"]["warmup_steps"] == 1
    said = next((tmp_path / "out" / "runs").glob("long-plan*.txt")).read_text()
    assert "resum" in said
    assert recipes.main(command) == 0
    assert "long: done" in capsys.readouterr().out


def test_the_better_of_the_long_pair_learns_to_talk(tmp_path, monkeypatch, capsys):
    lines = []
    for arm, loss in (("plan", 3.9), ("muon", 3.2), ("adamw", 2.0)):
        trial = Trial("long", arm, 0, 250_000_000, 2e-3, 6e-3, 0.3, 0.9875)
        lines.append(json.dumps(result(trial, loss)))
        if arm != "adamw":  # whose model is not there
            save_run(recipes.folder_of(trial, tmp_path), build(TALKING))
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    asked = []

    def tuned(config):
        asked.append(config)
        return fine_tune(replace(config, steps=3, eval_every=1, batch_size=2))

    monkeypatch.setattr(recipe_chat, "fine_tune", tuned)
    monkeypatch.setattr(recipe_chat, "LONGEST", 5)
    command = ["chat", "--output", str(tmp_path), "--device", "cpu"]
    for _ in range(2):  # the second time in place of the first
        assert recipes.main(command) == 0
    assert {config.sft.checkpoint.name.split("-")[1] for config in asked} == {"muon"}
    rates = [(config.lr, config.sft.epochs) for config in asked[:4]]
    assert rates == list(recipe_chat.TRIALS)
    text = (tmp_path / "chat.md").read_text()
    assert capsys.readouterr().out.count(text) == 2
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[2] for row in rows] == ["3"] * 4
    losses = [float(row[3].rstrip(" |")) for row in rows]
    assert len(set(losses)) > 1
    said = text.splitlines()
    for question in recipe_chat.QUESTIONS:
        assert said[said.index(f"> **{question}**") + 2].startswith(">")
    for beginning in recipe_chat.BEGINNINGS:
        assert f"> **{beginning}**" in text
    assert recipes.read_results(tmp_path)[1]["arm"] == "muon"


def test_chat_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no model of `long`: train one there first"):
        recipes.main(["chat", "--output", str(tmp_path)])
    trial = Trial("long", "muon", 0, 250_000_000, 2e-3, 6e-3, 0.3, 0.9875)
    save_run(recipes.folder_of(trial, tmp_path), build(TALKING))
    (tmp_path / "results.jsonl").write_text(json.dumps(result(trial, 3.2)))
    left = SimpleNamespace(exit_code=130, step=1)
    monkeypatch.setattr(recipe_chat, "fine_tune", lambda config: left)
    with pytest.raises(UserError, match="sft-lr1e-05-3-epochs did not come to its end: see"):
        recipes.main(["chat", "--output", str(tmp_path), "--device", "cpu"])
    assert not (tmp_path / "chat.md").exists()


def test_a_long_run_has_the_loss_of_its_end_or_none(data, tmp_path, monkeypatch):
    """Of three evaluations the last fails: the one before says nothing of a decayed run."""
    measure, calls = evaluation.validation_loss, itertools.count(1)

    def failing(*args):
        if next(calls) == 3:
            raise RuntimeError("no")
        return measure(*args)

    monkeypatch.setattr(evaluation, "validation_loss", failing)
    command = ["long", *data, "--output", str(tmp_path), "--known", "none", "--arms", "plan"]
    command += ["--tokens", "1536", *SMALL]
    with pytest.raises(UserError, match="long-plan.* could not be evaluated"):
        recipes.main(command)
    assert recipes.read_results(tmp_path) == []
    assert recipes.main(command) == 0
    (line,) = recipes.read_results(tmp_path)
    assert line["curve"][-1][2] == pytest.approx(line["val_loss"], abs=1e-4)


def test_long_runs_are_evaluated_on_steps_that_are_logged(tmp_path):
    trial = Trial("long", "plan", 0, 250_000_000, 2e-4, 2e-4, 0.1, 0.95, flags=("--option", "a"))
    config = recipes.runs.configure(trial, tmp_path)
    assert (config.steps, config.log_every, config.eval_every) == (10_172, 101, 505)


def test_recipes_are_compared_on_one_model_but_for_the_long_pair(tmp_path):
    """What a recipe changes of the model is measured by itself, and is in what a person gets."""
    trial = Trial("long", "muon", 0, 250_000_000, 2e-3, 6e-3, 0.3, 0.9875, flags=SMALL)
    assert recipes.runs.configure(trial, tmp_path).model.qk_norm
    for part in ("tune", "current", "ladder"):
        assert not recipes.runs.configure(replace(trial, part=part), tmp_path).model.qk_norm
    added = replace(trial, part="qk-norm", flags=(*SMALL, "--qk-norm"))
    assert recipes.runs.configure(added, tmp_path).model.qk_norm
    scope = Scope("qk-norm", ("plan",), (25_000_000,), (0, 1))
    assert [(t.seed, t.flags[-1]) for t in plan(scope, [])] == [(0, "--qk-norm"), (1, "--qk-norm")]


def test_a_trial_leaves_its_numbers_and_nothing_else(data, tmp_path, monkeypatch):
    """Of a run that chooses or compares nobody reads a checkpoint or a plot, unless it is left in
    its middle; nor does the clock stop one whose last step is done."""
    monkeypatch.setattr(recipes, "choose", lambda todo, results, *_, **__: not results and todo[0])
    asked = itertools.count(1)
    clock = SimpleNamespace(monotonic=lambda: math.inf if next(asked) in (4, 10) else 0.0)
    monkeypatch.setattr(recipes.runs, "time", clock)
    command = ["tune", *data, "--output", str(tmp_path), "--known", "none", "--arms", "muon"]
    command += ["--tokens", "1280", *SMALL]
    assert recipes.main(command) == 0
    assert recipes.read_results(tmp_path) == []
    (said,) = (tmp_path / "runs").glob("*.txt")
    before = len(said.read_text())
    assert recipes.main(command) == 0
    (line,) = recipes.read_results(tmp_path)
    assert (line["arm"], line["steps"], line["tokens_per_second"]) == ("muon", 10, None)
    assert line["val_loss"] > 0
    ended = said.read_text()[before:]
    assert "the 6 to come" in ended
    assert "done: 1.28K tokens" in ended
    assert "saved" not in ended
    assert "plots" not in ended
    assert list((tmp_path / "runs").iterdir()) == [said]


def test_a_command_begins_what_it_can_end(tmp_path):
    scope = Scope("ladder", ("plan",), (25_000_000, 50_000_000), (0,))
    short, long = todo = plan(scope, [])
    results = [result(short, 4.0, seconds=60.0), result(long, None, seconds=1.0)]
    now = recipes.time.monotonic()

    def chosen(seconds: float, *, is_first: bool = False) -> Trial | None:
        end = now + seconds
        return recipes.choose(todo, results, tmp_path, end=end, is_first=is_first)

    assert chosen(1000.0) is chosen(100.0) is short
    todo.remove(short)
    assert chosen(1000.0) is long
    assert chosen(100.0) is None
    assert chosen(100.0, is_first=True) is long  # or several short commands would never do it
    assert chosen(10.0, is_first=True) is None
    recipes.folder_of(long, tmp_path).mkdir(parents=True)
    assert chosen(100.0) is long  # it was left there


def test_speeds_are_measured_without_company(data, tmp_path):
    with (tmp_path / "lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="in use by another command"):
            recipes.main(["ladder", *data, "--output", str(tmp_path), "--known", "none"])
        with recipes.locked(tmp_path / "lock", is_shared=True):
            pass


def test_an_arm_is_searched_by_one_command(data, tmp_path):
    """A second one would go on with the run that the first is training."""
    command = ["tune", *data, "--output", str(tmp_path), "--known", "none", "--arms", "muon"]
    with (
        recipes.locked(tmp_path / "muon.lock", is_shared=False),
        pytest.raises(UserError, match="in use by another command"),
    ):
        recipes.main(command)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr", "1e-5"), "--lr is chosen for each run"),
        (("--embedding_lr=1e-5",), "--embedding-lr is chosen for each run"),
        (("--seed", "7"), "--seed is chosen for each run"),
        (("--warmup-steps", "7"), "--warmup-steps is chosen for each run"),
        (("--recipe", "plan"), "--recipe is chosen for each run"),
        (("--tokens", "inf"), "--tokens inf must be a number of 1 or more"),
        (("--tokens", "0"), "--tokens 0 must be"),
    ],
)
def test_flags_that_make_no_fair_run_are_refused(flags, message, data, tmp_path):
    with pytest.raises(UserError, match=message):
        recipes.main(["tune", *data, "--output", str(tmp_path), "--known", "none", *SMALL, *flags])
    assert not list(tmp_path.glob("shards*"))


def test_data_on_both_sides_or_read_twice_is_refused(data, tmp_path):
    def run(*flags: str):
        recipes.main(["tune", *flags, "--output", str(tmp_path), "--known", "none", *SMALL])

    with pytest.raises(UserError, match="--validation .*: 60 of its documents are in --data too"):
        run(*data[:2], "--validation", data[1], "--tokens", "1280")
    with pytest.raises(UserError, match="a run of 1,000,000 would read some twice"):
        run(*data, "--tokens", "1e6")


def test_other_data_than_that_of_the_results_is_refused(data, tmp_path):
    trial = plan(Scope("tune", ("adamw",), (1280,), (0,), SMALL), [])[0]
    (tmp_path / "tune.jsonl").write_text(json.dumps(result(trial, 4.0)) + "\n")
    with pytest.raises(UserError, match="measured on other documents"):
        recipes.main(
            [
                "tune",
                *data,
                "--output",
                str(tmp_path),
                "--tokens",
                "1280",
                "--known",
                "none",
                *SMALL,
            ]
        )


def test_tokens_to_a_loss_are_interpolated_in_their_logarithm():
    ends = {25_000_000: 5.0, 50_000_000: 4.5, 100_000_000: 4.25}
    inside, beyond = tokens_at(4.75, ends), tokens_at(4.0, ends)
    assert inside.tokens == pytest.approx(25e6 * 2**0.5)
    assert inside.is_inside
    assert beyond.tokens == pytest.approx(200e6)
    assert not beyond.is_inside
    assert tokens_at(5.5, ends).tokens == pytest.approx(12.5e6)
    assert tokens_at(4.0, {1: 5.0}) is None
    assert tokens_at(4.0, {1: 5.0, 2: 5.0}) is None


def test_ratios_have_student_t_intervals():
    ratio = Ratio.of([2.0, 4.0, 8.0])
    assert ratio.mean == pytest.approx(4.0)
    # t = 4.303 with two degrees of freedom, standard error ln 2 / sqrt 3.
    assert ratio.high / ratio.mean == pytest.approx(2 ** (4.302653 / 3**0.5), rel=1e-5)
    assert ratio.low * ratio.high == pytest.approx(16.0)
    # (ln 4 - 0) / (ln 2 / sqrt 3) = 3.4641
    assert ratio.p_above(1.0) == pytest.approx(0.0371, abs=1e-4)
    assert ratio.p_above(4.0) == pytest.approx(0.5)
    assert Ratio.of([2.0]).p_above(1.0) is None


def test_a_trend_is_taken_to_another_length():
    falling = {25_000_000: 4.0, 50_000_000: 2.0}
    found = trend([falling, falling], 100e6)
    assert found.per_doubling.mean == pytest.approx(0.5)
    assert found.at.mean == pytest.approx(1.0)
    assert trend([{25_000_000: 4.0}], 100e6) is None


def power_law(arm: str, tokens: int, seed: int) -> float:
    """Muon needs a third of the plan's tokens, and half of adamw's."""
    factor = {"plan": 1 / 3, "adamw": 1 / 2, "muon": 1.0}[arm]
    return 8 - 0.5 * math.log2(factor * tokens / 1e6) + 0.01 * seed


def test_the_report_says_how_many_times_the_tokens(tmp_path):
    results = [
        line | {"val_loss": line["val_loss"] + 0.01 * (line["arm"] == "muon") * line["seed"]}
        for line in ladder_results()
    ]
    diverged = result(plan(TUNE, [])[0], None)
    long = Trial("long", "muon", 0, 250_000_000, 2e-3, 2e-3, 0.1, 0.95)
    text = report([*results, diverged, result(long, 3.5)], tmp_path)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    reached = [row for row in cells if row[:1] == ["50"] and len(row) == 7]
    assert [row[3].split()[0] for row in reached] == ["2.98", "2.98", "1.99", "1.99"]
    assert [row[1] for row in reached] == ["16.8", "149.0*", "25.2", "99.3"]
    heads = [row[:2] for row in cells if len(row) == 7 and row[2] == "seeds"]
    assert heads[:2] == [
        ["M tokens of plan", "M tokens of muon"],
        ["M tokens of muon", "M tokens of plan"],
    ]
    # Muon's step costs 1/0.95, which is more than the ratio wanted can bear.
    assert reached[0][5].startswith("2.83")
    # By hand: logarithms of 3 and 3 / 2 ** 0.02, so t = (mean - ln 3) / (0.02 ln 2 / 2) = -1 with
    # one degree of freedom, p = 3 / 4.
    assert reached[0][4].startswith("0.7500 (> 3)")
    # Seeds that differ by 0.02 doublings: a slope of nothing, and the ratio itself at 10B.
    assert "would be 2.98" in text
    assert any(row[:1] == ["adamw"] and "diverged" in row for row in cells)
    assert "not yet inside" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"ladder.png", "long.png"}


def test_runs_on_other_documents_are_not_compared(tmp_path):
    """Each machine of the long pair has a folder of its own, so that nothing refused there."""
    plain, muon = (result(Trial("long", arm, 0, 250_000_000, *[0.1] * 4), 4.0) for arm in "pm")
    muon["data"] = {**muon["data"], "digest": "1", "train_tokens": 44_000_000}
    with pytest.raises(UserError, match="`long` are on .* of 112,000,000 tokens and of 44,000,000"):
        report([plain, muon], tmp_path)


def test_runs_of_other_flags_are_no_seeds(tmp_path):
    long = Trial("long", "muon", 0, 250_000_000, 2e-3, 6e-3, 0.3, 0.9875)
    other = replace(long, flags=("--matmul", "int8"))
    text = report([result(long, 3.2), result(other, 3.4)], tmp_path)
    rows = [line.split("|")[5:8] for line in text.splitlines() if line.startswith("| muon")]
    assert [(row[0].strip(), row[2].strip()) for row in rows] == [("1", "3.2000"), ("1", "3.4000")]


def test_a_report_says_what_one_length_cannot_tell(tmp_path):
    text = report(ladder_results((25_000_000,)), tmp_path)
    known, unknown = text.split("### plan reaches muon's loss\n\n")
    assert "| 25 " in known.split("### muon reaches plan's loss")[1]
    assert unknown.startswith("Not known yet: that takes two lengths of plan")


def test_a_run_that_diverged_has_its_curve_up_to_there(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(recipe_report, "write_figure", lambda path, figure: figures.append(figure))
    trial = Trial("long", "plan", 0, 250_000_000, 2e-4, 2e-4, 0.1, 0.95)
    line = result(trial, None, curve=[[1_000_000, 9.0, 9.1], [2_000_000, 30.0, None]])
    report([line], tmp_path)
    (axes,) = figures[0].axes
    ((tokens, bits),) = axes.lines[0].get_xydata()
    assert (tokens, bits) == (1.0, pytest.approx(9.1 * 7 / 31 / math.log(2)))


def test_time_has_each_seeds_own_speed_and_trends_no_extrapolation(tmp_path):
    slow = [
        line | {"tokens_per_second": line["tokens_per_second"] // (1 + line["seed"])}
        for line in ladder_results()
    ]
    # Beyond its longest run Muon would seem to need ever fewer tokens.
    steep = [
        line | {"val_loss": 0.0} if (line["arm"], line["tokens"]) == ("plan", 100_000_000) else line
        for line in slow
    ]
    text = report(steep, tmp_path)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    reached = [row for row in cells if row[:1] == ["50"] and len(row) == 7]
    assert reached[0][5] == "2.85 (2.85-2.85)"
    beyond = next(row for row in cells if row[:1] == ["100"] and row[1].endswith("*"))
    assert float(beyond[3].split()[0]) < 0.1
    assert "change the ratio by 1.00 (1.00-1.00) (2 seeds); on that line it would be 3.00" in text


def test_what_was_added_stands_beside_the_ladder(tmp_path):
    """Losses a quarter of a doubling lower, 0.125 nats, and 0.02 apart: by hand."""
    ladder = ladder_results()
    added = [
        line
        | {
            "part": "qk-norm",
            "flags": (*line["flags"], "--qk-norm"),
            "val_loss": line["val_loss"] - 0.125 + 0.02 * line["seed"],
            "tokens_per_second": 0.98 * line["tokens_per_second"],
        }
        for line in ladder
        if line["arm"] == "muon" and line["tokens"] >= 50e6
    ]
    text = report([*ladder, *added], tmp_path).split("## qk-norm")[1]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = {row[1]: row[2:] for row in cells if row[:1] == ["muon"] and len(row) == 6}
    # Student's t of one degree of freedom is 12.71: 12.71 x 0.02 / 2.
    assert rows["50"][:2] == ["2", "-0.1150 (-0.2421 to +0.0121)"]
    # Seeds' 0.25 and 0.21 doublings.
    assert rows["50"][2].startswith("1.17 (")
    assert rows["50"][3] == "0.980"
    assert rows["100"][2].endswith("*")
    alone = report(added, tmp_path)
    assert "Not known yet: that takes runs of the ladder" in alone


def test_runs_of_two_settings_make_no_line(tmp_path):
    other = {**ladder_results()[0], "lr": 7e-4, "tokens": 1}
    with pytest.raises(
        UserError, match="the ladder has runs of muon with .*0.0007.* and with .*0.002"
    ):
        report([*ladder_results(), other], tmp_path)


def ladder_results(lengths=LADDER.tokens) -> list[dict]:
    chosen = [
        {**vars(t), "part": "current", "diverged": False, "val_loss": 4.0} for t in plan(TUNE, [])
    ]
    scope = Scope("ladder", LADDER.arms, lengths, LADDER.seeds)
    return [result(t, power_law(t.arm, t.tokens, t.seed)) for t in plan(scope, chosen)]


def test_the_ladder_says_what_the_plan_says_of_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RATIOS", tmp_path / "ratios.json")
    lines = "".join(f"{json.dumps(line)}\n" for line in ladder_results())
    (tmp_path / "ladder.jsonl").write_text(lines)
    recipes.main(["fit", str(tmp_path)])
    written = json.loads((tmp_path / "ratios.json").read_text())
    assert (
        "22 runs of option current, 6.25M to 100M tokens of English, 2 seeds" in written["source"]
    )
    for recipe, ratio in (("adamw", 1.5), ("muon", 3.0)):
        points = written["ratios"][recipe]
        assert [point[1] for point in points] == pytest.approx([ratio] * len(points))
        assert {point[2] for point in points} == {SEVERAL_SEEDS}
    # Each of the plan's lengths, and those of Muon's whose loss lies between the plan's.
    assert [point[0] / 1e6 for point in written["ratios"]["muon"]] == pytest.approx(
        [25 / 3, 12.5, 50 / 3, 25, 100 / 3], rel=1e-3
    )
    with pytest.raises(UserError, match="between which adamw and plan reach one loss"):
        fit(ladder_results((25_000_000,)))


def test_the_plan_is_fitted_to_the_committed_results():
    """Whoever commits a ladder of two lengths an arm runs `python -m bench.recipes fit`."""
    committed = recipes.read_results(recipes.COMMITTED)
    ends = {(r["arm"], r["tokens"]) for r in committed if r["part"] == "ladder"}
    if all(len([end for end in ends if end[0] == arm]) > 1 for arm in recipes.ARMS["ladder"]):
        assert recipes.RATIOS.read_text() == fit(committed)
    ratios = json.loads(recipes.RATIOS.read_text())["ratios"]
    assert all(tokens > 0 and ratio > 0 for own in ratios.values() for tokens, ratio, _ in own)


def test_a_report_of_nothing_and_unknown_parts_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no .*jsonl with results"):
        recipes.main(["report", str(tmp_path)])
    with pytest.raises(
        UserError, match="pigeons is not one of tune, current, ladder, qk-norm, long, chat"
    ):
        recipes.main(["pigeons"])
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is not a result"):
        recipes.main(["report", str(tmp_path)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"part": "pigeons"}, "no part pigeons"),
        ({"val_loss": "4.0"}, "val_loss is '4.0'"),
        ({"val_loss": None}, "diverged is False, val_loss None"),
        ({"curve": None}, "curve is None"),
        ({"data": ...}, "KeyError.'data'."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_damaged_result_is_refused_by_its_line(changes, reason, tmp_path):
    line = {**result(plan(TUNE, [])[0], 4.0), **changes}
    line = {name: value for name, value in line.items() if value is not ...}
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(line)}\n")
    with pytest.raises(UserError, match=f"x.jsonl, line 1 is not a result .*{reason}.* take it"):
        recipes.main(["report", str(tmp_path)])
