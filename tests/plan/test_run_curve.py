"""Reading a run's log: what is joined, what is passed over, what is named, what is refused."""

import json

import numpy as np
import pytest

from hamner.errors import UserError
from hamner.plan.run_curve import UNTRAINED_LOSS, read_run


def truth(tokens):
    return 2.6 + 2085.43 / np.asarray(tokens, dtype=float) ** 0.3658


def write_jsonl(path, rows):
    lines = [json.dumps(dict(zip(("step", "tokens", "loss", "lr"), r, strict=True))) for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(tokens, loss, tokens_per_step=24_576, lr=2e-4):
    return [(t / tokens_per_step, t, y, lr) for t, y in zip(tokens, loss, strict=True)]


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


def test_csv_reads_as_jsonl(tmp_path):
    tokens = np.linspace(5e7, 2.5e9, 50)
    loss = truth(tokens)
    path = tmp_path / "log.csv"
    body = "".join(f"{i},{y},{t}\n" for i, (t, y) in enumerate(zip(tokens, loss, strict=True)))
    path.write_text("step,loss,tokens_total\n" + body + "50,3.4,2")  # cut while being written
    curve = read_run(path)
    assert np.array_equal(curve.tokens, tokens)
    assert np.array_equal(curve.loss, loss)


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_warm_up_is_read_from_either_name(tmp_path, name):
    tokens = np.arange(1, 101) * 1e7
    rates = 2e-4 * np.minimum(1, tokens / 2e8)
    path = tmp_path / "log.csv"
    rows = (f"{t},{truth(t)},{t},{lr}\n" for t, lr in zip(tokens, rates, strict=True))
    path.write_text(f"step,loss,tokens_total,{name}\n" + "".join(rows))
    curve = read_run(path)
    assert curve.warmup_tokens == 2e8
    assert curve.rate_left == 0
    path = write_jsonl(tmp_path / "m.jsonl", [(t, t, truth(t), 1 / t) for t in tokens])
    assert read_run(path).rate_left == pytest.approx(0.01)


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


def lost_at(tokens, lost):
    """The loss starts again after `lost` tokens, from an untrained model's."""
    return np.minimum(truth(np.where(tokens > lost, tokens - lost, tokens)), UNTRAINED_LOSS)


def test_lost_weights_are_named_by_step(tmp_path):
    tokens = np.arange(1, 1_001) * 2.4576e6
    loss = lost_at(tokens, 1e9)
    loss[[200, 700, 701]] += 5  # spikes, which are over at once
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows_of(tokens, loss)))
    (jump,) = curve.jumps
    assert (jump.step, jump.before) == (40_700, pytest.approx(truth(1e9), abs=0.01))
    assert str(jump).startswith(
        "Weights were lost at step 40,700 (1.00B tokens): the loss goes back from 3.67 to 10.80, "
        "near the 10.80 (ln V) of an untrained model"
    )
    assert curve.start == tokens[tokens <= 1e9][-1]
    assert curve.trained[0] == pytest.approx(2.4576e6)
    assert curve.trained_loss[0] == jump.after


@pytest.mark.parametrize("level", [7.5, 100])
def test_a_jump_that_is_not_near_ln_v_is_named_for_what_it_is(tmp_path, level):
    tokens = np.arange(1, 101) * 2.4576e7
    loss = np.where(tokens > 1e9, level, truth(tokens))
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows_of(tokens, loss)))
    assert f"jumps from 3.69 to {level:.2f} at step 41,000" in str(curve.jumps[0])
    assert "diverged, or restarted without its weights" in str(curve.jumps[0])


def test_a_restart_without_weights_that_also_counts_anew(tmp_path):
    """The first run's readings are replaced; that its weights were lost is still said."""
    tokens = np.arange(1, 101) * 1e7
    rows = rows_of(tokens, truth(tokens))
    rows += rows_of(tokens[:50], UNTRAINED_LOSS - np.arange(50) / 20, tokens_per_step=1e7)
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert [jump.step for jump in curve.jumps] == [1]
    assert curve.start == 0
    assert len(curve.tokens) == 50


def test_a_restart_that_was_put_right_is_no_jump(tmp_path):
    """Weights were lost, seen, and the run was started again from its checkpoint."""
    tokens = np.arange(1, 101) * 1e7
    rows = rows_of(tokens[:60], truth(tokens[:60]))
    rows += rows_of(tokens[60:70], np.full(10, UNTRAINED_LOSS))
    rows += rows_of(tokens[60:], truth(tokens[60:]))
    curve = read_run(write_jsonl(tmp_path / "metrics.jsonl", rows))
    assert curve.jumps == ()
    assert np.array_equal(curve.loss, truth(tokens))
