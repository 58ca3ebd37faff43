"""The fit of a run against curves whose truth is known, and what is said of runs gone wrong."""

import numpy as np
import pytest

from hamner.plan.projection import NoLaw, RunProjection, TooEarly, fit_run
from hamner.plan.run_curve import RunCurve, read_run
from tests.plan.loss_curves import MEASURED, SHIFTED_TWICE, correlated
from tests.plan.test_run_curve import rows_of, truth, write_jsonl

SIZE = 163_609_344
END = 10e9


def curve_of(tokens, loss, rates=0.0):
    return RunCurve(None, tokens, loss, np.broadcast_to(rates, tokens.shape))


def noisy_curve(seed, *, points=1000, last=2.5e9, noise=0.05, outliers=0.01):
    """Noise correlated over about five points, as a logged loss has, and some spikes."""
    random = np.random.default_rng(seed)
    tokens = np.linspace(last / points, last, points)
    errors = random.normal(0, noise, points)
    for i in range(1, points):
        errors[i] = 0.8 * errors[i - 1] + 0.6 * errors[i]
    errors[random.random(points) < outliers] += 2.0
    return tokens, truth(tokens) + errors


@pytest.mark.parametrize("points", [90, 1000])  # fitted as they are, and binned
def test_outliers_move_the_projection_little(tmp_path, points):
    tokens, loss = noisy_curve(3, points=points, outliers=0)
    spiked = loss.copy()
    spiked[::15] += 5.0
    clean, dirty = (fit_run(curve_of(tokens, y), END) for y in (loss, spiked))
    # Least squares would be off by the spikes' mean, 0.33, and more.
    assert dirty.loss(END) == pytest.approx(clean.loss(END), abs=0.05)


def test_restarted_noisy_run_projects_as_the_plain_one(tmp_path):
    tokens, loss = noisy_curve(1)
    plain = read_run(write_jsonl(tmp_path / "plain.jsonl", rows_of(tokens, loss)))
    # The abandoned branch had diverged; half way the batch halves, which tokens do not see.
    branch = rows_of(tokens[400:500], loss[400:500] + 1.0)
    rows = rows_of(tokens[:400], loss[:400]) + branch
    rows += rows_of(tokens[400:], loss[400:], tokens_per_step=12_288)
    restarted = read_run(write_jsonl(tmp_path / "restarted.jsonl", rows))
    assert np.array_equal(restarted.loss, plain.loss)
    assert fit_run(restarted, END).loss(END) == fit_run(plain, END).loss(END)


def test_warmup_is_left_out_of_the_fit(tmp_path):
    tokens = np.linspace(1e6, 4e8, 400)
    warmup = 5e7
    loss = truth(tokens) + 3 * np.exp(-tokens / 1.5e7)
    rates = 2e-4 * np.minimum(1, tokens / warmup)
    rows = [(t, t, y, lr) for t, y, lr in zip(tokens, loss, rates, strict=True)]
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert curve.warmup_tokens == pytest.approx(warmup, rel=0.05)
    assert fit_run(curve, END).loss(4e9) == pytest.approx(truth(4e9), abs=0.05)


def project(tokens, loss, parameters=SIZE):
    return RunProjection(curve_of(tokens, loss), parameters, END)


def test_fit_recovers_a_clean_curve():
    tokens = np.linspace(1e7, 2.5e9, 500)
    fit = fit_run(curve_of(tokens, truth(tokens)), END)
    assert fit.loss(END) == pytest.approx(truth(END), abs=2e-3)
    slope = (truth(2.5e9 + 1e6) - truth(2.5e9 - 1e6)) / 2e6
    assert fit.slope == pytest.approx(slope, rel=0.01)


def test_a_point_lies_inside_its_own_interval():
    """Also where few, noisy readings make all laws alike."""
    for seed in range(20):
        tokens, loss = noisy_curve(seed, points=25, noise=0.2, outliers=0.1)
        try:
            fit = fit_run(curve_of(tokens, loss), END)
        except NoLaw:
            continue
        for at in (tokens[-1], END, 100 * END):
            low, high = fit.interval(at)
            assert low < fit.loss(at) < high


@pytest.mark.parametrize("final_rate", [None, 0.0, 0.5, 1.0])
def test_a_learning_rate_still_to_fall_widens_the_interval(final_rate):
    tokens, loss = noisy_curve(0)
    rates = 1 - tokens / 5e9
    curve = RunCurve(None, tokens, loss, rates, final_rate=final_rate)
    left = {None: 0.5, 0.0: 0.5, 0.5: 0.0, 1.0: 0.0}[final_rate]
    assert curve.rate_left == pytest.approx(left, abs=0.01)
    constant, falling = fit_run(curve_of(tokens, loss, 1.0), END), fit_run(curve, END)
    assert falling.loss(END) == constant.loss(END)
    (low, high), (lower, higher) = constant.interval(END), falling.interval(END)
    assert low - lower == pytest.approx(higher - high)
    assert (low - lower > 0.005) == (left > 0)
    assert falling.interval(tokens[-1]) == constant.interval(tokens[-1])


def test_the_schedule_is_read_from_the_run_itself(tmp_path):
    tokens, loss = noisy_curve(0, points=50)
    path = write_jsonl(tmp_path / "metrics.jsonl", rows_of(tokens, loss))
    assert read_run(path).final_rate is None
    (tmp_path / "config.json").write_text('{"lr": 2e-3, "min_lr": 2e-4}')
    assert read_run(path).final_rate == pytest.approx(0.1)
    for damaged in ('{"lr": 0, "min_lr": 0}', '{"lr": "x"}', "[]", "{"):
        (tmp_path / "config.json").write_text(damaged)
        assert read_run(path).final_rate is None


def test_short_run_says_how_many_points_it_lacks():
    tokens, loss = noisy_curve(0, points=12)
    run = project(tokens, loss)
    assert run.law is None
    (found,) = run.diagnosis()
    assert "too short for a law: 11 of its 12 points" in found


@pytest.mark.parametrize(
    ("parameters", "last", "verdict"),
    [
        (SIZE, 5e8, "No capacity wall yet: 0.50B tokens seen is 15%"),
        (SIZE, 2.45e9, "Near the capacity wall: "),
        (SIZE, 3.4e9, "Capacity wall, "),
    ],
)
def test_diagnosis_follows_tokens_against_compute_optimal(parameters, last, verdict):
    tokens = np.linspace(last / 200, last, 200)
    (found,) = project(tokens, truth(tokens), parameters).diagnosis()
    assert found.startswith(verdict)


def test_published_law_is_shifted_to_what_the_run_does():
    """A run slower than the published law: what is said of its size is as its own law has it."""
    tokens, loss = through((MEASURED[0], MEASURED[1][0]), 2.45e9)
    run = project(tokens, loss)
    assert run.law.loss(SIZE, END) == pytest.approx(run.fit.loss(END))
    for goal in (3.6, 3.45, run.fit.loss(5e9)):
        reached = run.law_near(goal).tokens_to_reach(goal, SIZE)
        assert run.fit.loss(reached) == pytest.approx(goal, abs=2e-3)
    # Beyond the end nothing is projected, and no earlier end is promised.
    never = run.fit.loss(END) - 0.05
    assert (run.law_near(never).tokens_to_reach(never, SIZE) or np.inf) > END
    off = run.fit.loss(2.45e9) - run.fit.loss(4.9e9)
    (found,) = (text for text in run.diagnosis() if "as many tokens again" in text)
    assert f"would take {off:.2f} off the loss, as the run goes" in found


def through(points, last, count=500):
    """A log through measured points, with noise."""
    random = np.random.default_rng(0)
    tokens = np.linspace(last / count, last, count)
    loss = np.interp(np.log(tokens), np.log(points[0]), points[1])
    return tokens, loss + random.normal(0, 0.03, count)


@pytest.mark.parametrize("last", [49.5e6, 98e6, 491e6, 1e9, 2e9, 2.45e9])
def test_labels_shifted_twice_are_no_capacity_wall(last):
    """A run with right labels reaches 3.41: the answer is not a larger model."""
    run = project(*through(SHIFTED_TWICE, last))
    found = " ".join(run.diagnosis())
    assert "Check labels and data before you buy a larger model" in found
    assert "wall" not in found
    assert run.law is None


@pytest.mark.parametrize("losses", MEASURED[1])
@pytest.mark.parametrize("last", [98e6, 491e6, 1e9, 2.45e9])
def test_right_labels_are_not_doubted(losses, last):
    run = project(*through((MEASURED[0], losses), last))
    assert run.suspicion is None


def test_few_points_are_enough_to_doubt_the_labels():
    run = project(*map(np.array, SHIFTED_TWICE))
    assert "1.3 nats above the 3.41" in run.diagnosis()[0]
    assert "too short for a law" in run.diagnosis()[1]


def test_a_loss_near_zero_is_no_capacity_wall_either():
    """Targets that are not shifted at all are among the inputs."""
    tokens = np.linspace(1e7, 8e9, 300)
    for at_end in (1e-4, 0.9):
        found = project(tokens, at_end * (tokens / 8e9) ** -0.5).diagnosis()
        assert found[0].startswith("Check labels and data: the loss is far below the 3.")
        assert "wall" not in " ".join(found)


def test_a_run_in_warm_up_is_not_doubted():
    tokens = np.linspace(1e6, 6e7, 100)
    assert project(tokens, np.full(100, 7.0)).suspicion
    curve = curve_of(tokens, np.full(100, 7.0), tokens)
    assert RunProjection(curve, SIZE, END).suspicion is None


@pytest.mark.parametrize("rise", [0.0, 0.05])
def test_a_loss_that_does_not_fall_has_no_law(rise):
    tokens = np.linspace(2.45e6, 2.45e9, 1_000)
    wiggles = 0.01 * correlated(np.random.default_rng(1), 1_000, 3)
    run = project(tokens, 3.4 + rise * tokens / 1e9 + wiggles + 1e-5 * np.arange(1_000))
    assert run.fit is run.law is None
    (found,) = run.diagnosis()
    assert found.startswith("The loss is not falling")


def test_a_loss_that_fell_and_rises_again_is_not_falling():
    tokens = np.linspace(2.45e6, 2.45e9, 1_000)
    loss = truth(tokens) + (tokens > 2e9) * 0.3
    assert project(tokens, loss).diagnosis()[0].startswith("The loss is not falling")


def test_a_curve_that_no_law_fits():
    """A staircase: the data became easier twice."""
    tokens = np.linspace(2.45e6, 2.45e9, 1_000)
    loss = 3.8 - 0.6 * (tokens > 8e8) - 0.5 * (tokens > 2.1e9)
    run = project(tokens, loss)
    assert run.fit is run.law is None
    assert "Nothing is projected: no law fits: the loss wanders 0." in run.diagnosis()[0]


def leaving_a_plateau(tokens):
    """Flat until 10M tokens, a power law of exponent 0.3 long after them."""
    return 2.6 + 4.0 * (1 + (tokens / 1e7) ** 2) ** -0.15


@pytest.mark.parametrize(
    ("last", "end", "found"),
    [
        (2e7, 1e9, "after about 63.2M tokens."),
        (2e7, 5e7, "after about 63.2M tokens, which this run will not see."),
        (1e9, 1e10, None),
    ],
)
def test_a_run_just_out_of_its_plateau_is_too_early_for_a_law(last, end, found):
    tokens = np.linspace(last / 500, last, 500)
    noise = 0.02 * np.random.default_rng(0).normal(size=500)
    curve = curve_of(tokens, leaving_a_plateau(tokens) + noise)
    run = RunProjection(curve, SIZE, end)
    assert (run.fit is None) == bool(found)
    if found:
        (said,) = run.diagnosis()
        assert said.startswith("Nothing is projected: it is too early, the loss still falls as")
        assert said.endswith(found)


def test_the_tokens_to_ask_again_after_count_those_before_weights_were_lost(tmp_path):
    tokens = np.linspace(4e4, 2e7, 500)
    after = RunCurve(None, tokens + 1e9, leaving_a_plateau(tokens), 0 * tokens, start=1e9)
    assert "after about 1.06B tokens." in RunProjection(after, SIZE, END).diagnosis()[0]


def test_noise_that_hides_the_slowing_is_named():
    tokens = np.linspace(1e7, 2.45e9, 60)
    noise = 0.15 * np.random.default_rng(2).normal(size=60)
    with pytest.raises(TooEarly, match="noise hides whether the loss falls less"):
        fit_run(curve_of(tokens, truth(tokens) + noise), END)


def test_a_run_that_lost_its_weights_is_projected_from_there(tmp_path):
    tokens = np.arange(1, 1_001) * 2.4576e6
    loss = np.minimum(truth(np.where(tokens > 1e9, tokens - 1e9, tokens)), 10.8)
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows_of(tokens, loss)))
    run = RunProjection(curve, SIZE, END)
    assert run.fit.loss(run.tokens_at_end) == pytest.approx(truth(9e9), abs=0.01)
    lost, verdict = run.diagnosis()
    assert lost.startswith("Weights were lost at step 40,700 (1.00B tokens)")
    assert verdict.startswith("No capacity wall yet: 1.46B tokens seen")


def test_a_small_run_is_projected_but_says_nothing_of_other_sizes():
    tokens = np.linspace(1e4, 2e6, 200)
    run = project(tokens, 4.0 + 1.5 * (tokens / 2e6) ** -0.3, parameters=900_000)
    assert run.projected.loss(2e6) == pytest.approx(5.5, abs=0.01)
    assert run.law is None
    assert run.diagnosis()[-1].startswith("Nothing is said of other sizes")
