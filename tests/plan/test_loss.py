"""The loss law against its papers, and the fit of a run against curves whose truth is known."""

import json
import math

import numpy as np
import pytest

from hamner.errors import UserError
from hamner.plan.loss import (
    BESIROGLU,
    HOFFMANN,
    KNOWN_RUN,
    RunCurve,
    RunProjection,
    compute_optimal_tokens,
    fit_run,
    read_run,
)

FLOOR, SCALE, EXPONENT = 2.6, 2085.43, 0.3658
END = 10e9


def truth(tokens):
    return FLOOR + SCALE / np.asarray(tokens, dtype=float) ** EXPONENT


def noisy_curve(seed, *, points=1000, last=2.5e9, noise=0.05, outliers=0.01):
    """Noise correlated over about five points, as a logged loss has, and some spikes."""
    random = np.random.default_rng(seed)
    tokens = np.linspace(last / points, last, points)
    errors = random.normal(0, noise, points)
    for i in range(1, points):
        errors[i] = 0.8 * errors[i - 1] + 0.6 * errors[i]
    errors[random.random(points) < outliers] += 2.0
    return tokens, truth(tokens) + errors


def write_jsonl(path, rows):
    lines = [json.dumps(dict(zip(("step", "tokens", "loss", "lr"), r, strict=True))) for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(tokens, loss, tokens_per_step=24_576, lr=2e-4):
    return [(t / tokens_per_step, t, y, lr) for t, y in zip(tokens, loss, strict=True)]


def test_published_laws():
    """The papers' own figures: Chinchilla, 70B parameters on 1.4T tokens."""
    assert HOFFMANN.loss(70e9, 1.4e12) == pytest.approx(1.69 + 0.083 + 0.163, abs=2e-3)
    assert BESIROGLU.loss(70e9, 1.4e12) == pytest.approx(1.8172 + 0.081 + 0.075, abs=2e-3)


@pytest.mark.parametrize(("law", "low", "high"), [(BESIROGLU, 15, 30), (HOFFMANN, 50, 100)])
def test_tokens_per_parameter_at_chinchillas_compute(law, low, high):
    """Minimised numerically at 6 N D = Gopher's 5.76e23 FLOPs: why the re-fit is the default."""
    parameters = np.geomspace(1e9, 1e12, 20_001)
    tokens = 5.76e23 / 6 / parameters
    losses = law.irreducible + law.a / parameters**law.alpha + law.b / tokens**law.beta
    best = losses.argmin()
    assert low < tokens[best] / parameters[best] < high


def test_tokens_to_reach_inverts_the_law():
    assert BESIROGLU.tokens_to_reach(BESIROGLU.loss(3e8, 5e9), 3e8) == pytest.approx(5e9)
    assert BESIROGLU.tokens_to_reach(1.9, 3e8) is None


def test_shifted_law_passes_through_the_run_and_keeps_differences():
    law = BESIROGLU.through(*KNOWN_RUN)
    assert law.loss(*KNOWN_RUN[:2]) == pytest.approx(3.41)
    difference = BESIROGLU.loss(3e8, 1e10) - BESIROGLU.loss(1e8, 1e10)
    assert law.loss(3e8, 1e10) - law.loss(1e8, 1e10) == pytest.approx(difference)


def test_compute_optimal_tokens_of_option_a():
    assert compute_optimal_tokens(320_914_432) == 6_418_288_640


def test_fit_recovers_a_clean_curve(tmp_path):
    tokens = np.linspace(1e7, 2.5e9, 500)
    fit = fit_run(RunCurve(tmp_path, tokens, truth(tokens), 0.0))
    assert fit.exponent == pytest.approx(EXPONENT, abs=0.005)
    assert fit.loss(END) == pytest.approx(truth(END), abs=1e-3)
    slope = (truth(2.5e9 + 1e6) - truth(2.5e9 - 1e6)) / 2e6
    assert fit.slope == pytest.approx(slope, rel=0.01)


def test_80_percent_interval_covers_the_truth(tmp_path):
    """Of 40 noisy runs projected to four times their tokens, 26 to 38 must be held (80% is 32)."""
    held, widths = 0, []
    for seed in range(40):
        fit = fit_run(RunCurve(tmp_path, *noisy_curve(seed), 0.0), replicas=100)
        low, high = fit.interval(END)
        held += low <= truth(END) <= high
        widths.append(high - low)
    assert 26 <= held <= 38
    assert np.median(widths) < 0.25


@pytest.mark.parametrize("points", [90, 1000])  # fitted as they are, and binned
def test_outliers_move_the_projection_little(tmp_path, points):
    tokens, loss = noisy_curve(3, points=points, outliers=0)
    spiked = loss.copy()
    spiked[::15] += 5.0
    clean, dirty = (fit_run(RunCurve(tmp_path, tokens, y, 0.0)) for y in (loss, spiked))
    # Least squares would be off by the spikes' mean, 0.33, and more.
    assert dirty.loss(END) == pytest.approx(clean.loss(END), abs=0.05)


def test_fit_is_deterministic(tmp_path):
    curve = RunCurve(tmp_path, *noisy_curve(0), 0.0)
    assert np.array_equal(fit_run(curve).replicas, fit_run(curve).replicas)


def test_restart_keeps_the_later_reading(tmp_path):
    tokens = np.arange(1, 101) * 1e7
    first, second = truth(tokens), truth(tokens) + 0.001
    rows = rows_of(tokens[:60], first[:60]) + rows_of(tokens[40:], second[40:])
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert np.array_equal(curve.tokens, tokens)
    assert np.array_equal(curve.loss, np.concatenate([first[:40], second[40:]]))


def test_a_second_run_in_the_same_file_replaces_the_first(tmp_path):
    tokens = np.arange(1, 51) * 1e7
    rows = rows_of(tokens, truth(tokens) + 1) + rows_of(tokens, truth(tokens))
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert np.array_equal(curve.loss, truth(tokens))


def test_step_counter_that_starts_again(tmp_path):
    tokens = np.arange(1, 101) * 1e7
    rows = [
        (i % 50, t, y, 2e-4) for i, (t, y) in enumerate(zip(tokens, truth(tokens), strict=True))
    ]
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert np.array_equal(curve.tokens, tokens)


def test_token_counter_that_starts_again_is_continued(tmp_path):
    tokens = np.arange(1, 101) * 1e7
    logged = np.where(tokens > 5e8, tokens - 5e8, tokens)
    rows = [(i, t, y, 2e-4) for i, (t, y) in enumerate(zip(logged, truth(tokens), strict=True))]
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert np.array_equal(curve.tokens, tokens)


def test_resume_with_a_smaller_batch_logs_fewer_tokens_at_a_later_step(tmp_path):
    """An overlap, not a counter that started again."""
    tokens = [*(1e7 * np.arange(1, 51)), *(4.95e8 + 5e6 * np.arange(0, 20))]
    rows = [(i, t, float(truth(t)), 2e-4) for i, t in enumerate(tokens)]
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert curve.tokens[-1] == tokens[-1]
    assert np.all(np.diff(curve.tokens) > 0)


def test_restarted_noisy_run_projects_as_the_plain_one(tmp_path):
    tokens, loss = noisy_curve(1)
    plain = read_run(write_jsonl(tmp_path / "plain.jsonl", rows_of(tokens, loss)))
    # The abandoned branch had diverged; half way the batch halves, which tokens do not see.
    branch = rows_of(tokens[400:500], loss[400:500] + 1.0)
    rows = rows_of(tokens[:400], loss[:400]) + branch
    rows += rows_of(tokens[400:], loss[400:], tokens_per_step=12_288)
    restarted = read_run(write_jsonl(tmp_path / "restarted.jsonl", rows))
    assert np.array_equal(restarted.loss, plain.loss)
    assert fit_run(restarted).loss(END) == fit_run(plain).loss(END)


def test_warmup_is_left_out_of_the_fit(tmp_path):
    tokens = np.linspace(1e6, 4e8, 400)
    warmup = 5e7
    loss = truth(tokens) + 3 * np.exp(-tokens / 1.5e7)
    rates = 2e-4 * np.minimum(1, tokens / warmup)
    rows = [(t, t, y, lr) for t, y, lr in zip(tokens, loss, rates, strict=True)]
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert curve.warmup_tokens == pytest.approx(warmup, rel=0.05)
    assert fit_run(curve).loss(4e9) == pytest.approx(truth(4e9), abs=0.05)


def test_csv_reads_as_jsonl(tmp_path):
    tokens, loss = noisy_curve(2, points=50)
    path = tmp_path / "log.csv"
    body = "".join(f"{i},{y},{t}\n" for i, (t, y) in enumerate(zip(tokens, loss, strict=True)))
    path.write_text("step,loss,tokens_total\n" + body + "50,3.4,2")  # cut while being written
    curve = read_run(path)
    assert np.array_equal(curve.tokens, tokens)
    assert np.array_equal(curve.loss, loss)


def test_lines_without_a_loss_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "tokens": 100, "loss": 5.0}',
        '{"step": 1, "tokens": 100, "loss": null, "val_loss": 4.9}',
        '{"step": 2, "tokens": 200, "loss": NaN}',
        '{"step": 3, "tokens": 300, "loss": 4.0}',
        '{"step": 4, "tok',  # being written
    ]
    path.write_text("\n".join(lines))
    assert read_run(path).loss.tolist() == [5.0, 4.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"step": 1, "tokens": 9, "loss": 5}\n{"step"\n{}\n', "line 2 is not a JSON"),
        ("m.jsonl", "[1, 2]\n", "line 1 is not a JSON object"),
        ("m.jsonl", '{"step": 1, "loss": 5}\n', "line 1 has no field 'tokens'"),
        ("m.jsonl", '{"step": 1, "tokens": "x", "loss": 5}\n', "line 1: step, tokens, loss"),
        ("m.jsonl", "", "is empty"),
        ("m.csv", "step,loss\n1,2\n", "line 1 has no column tokens_total"),
        ("m.csv", "step,loss,tokens_total\n1,5,100\n2,4\n3,4,300\n", "line 3 has too few"),
        ("m.csv", "step,loss,tokens_total\n1,5,1e9\n2,bad,2e9\n", "line 3: step, tokens_total"),
        ("m.txt", "", "neither .jsonl nor .csv"),
    ],
)
def test_bad_files_name_the_file_and_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_run(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read: No such file"):
        read_run(tmp_path / "gone.jsonl")


def test_short_run_says_how_many_points_it_lacks(tmp_path):
    tokens, loss = noisy_curve(0, points=12)
    path = write_jsonl(tmp_path / "metrics.jsonl", rows_of(tokens, loss))
    with pytest.raises(UserError, match=r"metrics\.jsonl is too short: 11 of its 12 points"):
        fit_run(read_run(path))


def diagnose(parameters, last, sign=1):
    tokens = np.linspace(last / 200, last, 200)
    curve = RunCurve(None, tokens, 3 + sign * (truth(tokens) - FLOOR), 0.0)
    return RunProjection(curve, fit_run(curve), parameters, END).diagnosis()


def test_diagnosis_follows_tokens_against_compute_optimal():
    assert diagnose(163_609_344, 5e8).startswith("No capacity wall yet: 0.50B tokens seen is 15%")
    assert diagnose(163_609_344, 2.45e9).startswith("Near the capacity wall: ")
    assert diagnose(163_609_344, 8e9).startswith("Capacity wall, ")
    assert diagnose(163_609_344, 5e8, sign=-1).startswith("The loss is not falling")


def test_projection_shifts_the_law_through_the_run():
    tokens = np.linspace(1e7, 2.45e9, 300)
    curve = RunCurve(None, tokens, truth(tokens), 0.0)
    projection = RunProjection(curve, fit_run(curve), 163_609_344, END)
    assert projection.law.loss(163_609_344, 2.45e9) == pytest.approx(truth(2.45e9), abs=1e-3)
    assert math.isclose(projection.loss_now, projection.fit.loss(2.45e9))
