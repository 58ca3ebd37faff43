"""The plan's sums, its flags, and the command as a person runs it."""

import math
import subprocess
import sys

import numpy as np
import pytest

from hamner.errors import UserError
from hamner.hardware import GPUS
from hamner.options import OPTIONS
from hamner.plan import COMPARED, PlanConfig, analyse, compare, find_gpu, main, make_plan, recommend
from hamner.recompute import GIB
from hamner.scaling_law import BESIROGLU, KNOWN_RUN

RTX_3090 = GPUS["rtx-3090"]


def run_command(*arguments, code=0):
    result = subprocess.run(
        [sys.executable, "-m", "hamner.plan", *arguments], capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tokens = np.linspace(1e7, 2.45e9, 300)
    loss = 2.6 + 2085.43 / tokens**0.3658 + np.random.default_rng(0).normal(0, 0.03, 300)
    path.write_text(
        "".join(
            f'{{"step": {i}, "tokens": {t}, "loss": {y}, "lr": 2e-4}}\n'
            for i, (t, y) in enumerate(zip(tokens, loss, strict=True))
        )
    )
    return path


def test_option_a_on_a_3090():
    plan = make_plan(OPTIONS["a"], RTX_3090)
    assert plan.parameters == plan.active_parameters == 320_914_432
    assert plan.tokens == 10_000_000_000
    assert plan.steps == 406_901
    assert plan.hours == pytest.approx(1e10 / plan.prediction.tokens_per_second / 3600)
    assert plan.tokens_in(plan.hours) == pytest.approx(plan.tokens)
    assert plan.vram_budget == 22 * GIB
    assert plan.memory.account.total <= plan.vram_budget
    assert plan.prediction.peak_gib == pytest.approx(plan.memory.account.total / GIB)


def test_expected_loss_of_a_mixture_is_a_range():
    dense, mixture = (make_plan(OPTIONS[name], RTX_3090) for name in ("a", "c"))
    low, high = dense.loss_range(BESIROGLU)
    assert low == high == BESIROGLU.loss(320_914_432, 1e10)
    low, high = mixture.loss_range(BESIROGLU, 5e9)
    assert low == BESIROGLU.loss(352_414_464, 5e9)
    assert high == BESIROGLU.loss(210_856_704, 5e9)


def test_a_smaller_budget_recomputes_more_and_is_slower():
    roomy, tight = (make_plan(OPTIONS["a"], RTX_3090, vram_budget=g) for g in (22, 12))
    assert tight.memory.account.total <= 12 * GIB
    assert any(policy.name == "full" for policy in tight.memory.policies)
    assert tight.prediction.tokens_per_second < roomy.prediction.tokens_per_second


def test_compare_lists_what_does_not_fit():
    plans, misfits = compare(RTX_3090, vram_budget=5)
    assert {plan.option.name for plan in plans} | set(misfits) == set(COMPARED)
    assert "current" not in misfits
    assert "--vram-budget 5.0 GiB is too small" in misfits["a"]


def test_recommendation_is_the_lowest_loss_in_the_same_hours():
    plans, _ = compare(RTX_3090)
    by_name = {plan.option.name: plan for plan in plans}
    best = recommend(plans, by_name["a"].hours)
    losses = {
        name: BESIROGLU.loss(plan.active_parameters, plan.tokens_in(by_name["a"].hours))
        for name, plan in by_name.items()
        if name != "a-short"  # half its context
    }
    assert best.option.name == min(losses, key=losses.get)
    # With a day only, tokens count for more than parameters.
    assert recommend(plans, 12).active_parameters < best.active_parameters


def test_tokens_and_run_shift_the_local_law(metrics):
    analysis = analyse(PlanConfig(option="current", tokens=5e9, metrics=metrics))
    assert analysis.plan.tokens == 5_000_000_000
    assert analysis.run.end_tokens == 5e9
    seen = analysis.run.tokens_seen
    assert analysis.local_law.loss(163_609_344, seen) == pytest.approx(analysis.run.loss_now)
    without = analyse(PlanConfig(option="current"))
    assert without.local_law.loss(*KNOWN_RUN[:2]) == pytest.approx(KNOWN_RUN[2])


def test_custom_gpu():
    gpu = find_gpu("custom", (100.0, 1000.0, 16.0, 50.0))
    assert (gpu.bf16_tflops, gpu.bandwidth_gbs, gpu.memory_gib, gpu.fp32_tflops) == (
        100,
        1000,
        16,
        50,
    )
    assert make_plan(OPTIONS["current"], gpu).vram_budget == 14 * GIB


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"option": "d"}, "--option d is not one of tiny, current, a,"),
        ({"gpu": "rtx-9999"}, "--gpu rtx-9999 is not one of rtx-3090,"),
        ({"gpu": "custom"}, "--gpu custom needs --gpu-spec"),
        ({"gpu": "custom", "gpu_spec": (1.0, 0.0, 1.0, 1.0)}, "four numbers above 0"),
        ({"gpu": "custom", "gpu_spec": (1.0, math.nan, 1.0, 1.0)}, "four numbers above 0"),
        ({"gpu_spec": (1.0, 1.0, 1.0, 1.0)}, "use it with --gpu custom, not rtx-3090"),
        ({"tokens": 100.0}, "--tokens 100 must be at least one step of option a, 24,576"),
        ({"tokens": math.inf}, "--tokens inf must be"),
        ({"tokens": math.nan}, "--tokens nan must be"),
        ({"vram_budget": 0.0}, "--vram-budget 0 GiB must be above 0 and at most the 24 GiB"),
        ({"vram_budget": 48.0}, "--vram-budget 48 GiB must be above 0 and at most the 24 GiB"),
        ({"vram_budget": 1.0}, "--vram-budget 1.0 GiB is too small"),
        ({"option": "all", "vram_budget": 1.0}, "--vram-budget 1.0 GiB is too small"),
        ({"option": "all", "metrics": "m.jsonl"}, "--metrics needs the --option"),
    ],
)
def test_bad_input(flags, message):
    with pytest.raises(UserError) as error:
        analyse(PlanConfig(**flags))
    assert message in str(error.value)


def test_command_prints_the_plan_without_torch():
    code = (
        "import sys; from hamner.plan import main; main(['--option', 'a']); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    speed = make_plan(OPTIONS["a"], RTX_3090).prediction.tokens_per_second
    for text in ("320.9M", "406,901", "selective", f"{speed:,.0f}", "6.42B", "projected"):
        assert text in result.stdout


def test_command_compares_all(capsys):
    main(["--option", "all", "--gpu", "h100"])
    out = capsys.readouterr().out
    assert all(name in out for name in COMPARED)
    assert "with 4 experts, 2 active, it has 210.9M" in out
    assert "16,384, fewer than 24,576. 72 x 512 would be 36,864" in out
    assert "compute-optimal budget at 6.42B" in out


def test_command_reads_metrics(capsys, metrics):
    main(["--option", "current", "--metrics", str(metrics)])
    out = capsys.readouterr().out
    assert "after 2.45B tokens" in out
    assert "Near the capacity wall" in out
    assert "loss 3.5 (perplexity 33)" in out


def test_exit_codes():
    assert "a custom card" in run_command("--help").stdout
    bad = run_command("--gpu", "abacus", code=2)
    assert bad.stderr.startswith("error: --gpu abacus is not one of")
    assert "Traceback" not in bad.stderr
    run_command("--no-such-flag", code=2)
