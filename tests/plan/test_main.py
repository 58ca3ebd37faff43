"""The plan's sums, its flags, and the command as a person runs it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS
from hamner.plan.__main__ import PlanConfig, analyse, find_gpu, main
from hamner.plan.analysis import COMPARED, make_plan, recommend
from hamner.plan.loss import BESIROGLU, KNOWN_RUN
from hamner.plan.report import document
from tests.imports import output_without
from tests.plan.loss_curves import SHIFTED_TWICE
from tests.plan.test_report_card import CARD

RTX_3090 = GPUS["rtx-3090"]
CUSTOM = {"gpu": "custom", "gpu_spec": (71.2, 936.0, 24.0, 35.6)}


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
    assert plan.config.tokens == 10_000_000_000
    assert plan.steps == 406_901
    assert plan.hours == pytest.approx(1e10 / plan.prediction.tokens_per_second / 3600)
    assert plan.tokens_in(plan.hours) == pytest.approx(plan.config.tokens)
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
    analysis = analyse(PlanConfig(option="all", vram_budget=5))
    misfits = analysis.misfits
    assert {plan.config.option for plan in analysis.plans} | set(misfits) == set(COMPARED)
    assert "current" not in misfits
    assert "--vram-budget 5 GiB is too small" in misfits["a"]


def test_recommendation_is_the_lowest_loss_in_the_same_hours():
    plans = analyse(PlanConfig(option="all")).plans
    by_name = {plan.config.option: plan for plan in plans}
    best = recommend(plans, by_name["a"].hours)
    losses = {
        name: BESIROGLU.loss(plan.active_parameters, plan.tokens_in(by_name["a"].hours))
        for name, plan in by_name.items()
        if name != "a-short"  # half its context
    }
    assert best.config.option == min(losses, key=losses.get)
    # With a day only, tokens count for more than parameters.
    assert recommend(plans, 12).active_parameters < best.active_parameters


def test_tokens_and_run_shift_the_local_law(metrics):
    analysis = analyse(PlanConfig(option="current", tokens=5e9, metrics=metrics))
    assert analysis.plan.config.tokens == 5_000_000_000
    assert analysis.run.end_tokens == 5e9
    end = analysis.run.fit.loss(5e9)
    assert analysis.local_law.loss(163_609_344, 5e9) == pytest.approx(end)
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


def plan_of(**flags):
    return analyse(PlanConfig(**flags)).plan


def test_two_3090s_share_the_options_batch():
    """By hand: one bf16 gradient, 641.8 MB, at 10 GB/s; the embedding's 100.7 MB are not hidden."""
    one, two = plan_of(), plan_of(gpus=2)
    assert (two.parallelism.kind, two.rows_per_gpu) == ("ddp", 12)
    assert (two.steps, two.config.tokens) == (one.steps, one.config.tokens)
    assert two.prediction.communication.ms == pytest.approx(64.18, abs=0.01)
    assert two.prediction.communication.exposed_ms == pytest.approx(10.07, abs=0.01)
    assert two.communication_share == pytest.approx(10.07 / two.prediction.step_ms, abs=1e-4)
    assert two.hours == pytest.approx(1e10 / two.prediction.tokens_per_second / 3600)
    assert one.hours / 2 / two.hours == pytest.approx(two.efficiency)
    assert 0.9 < two.efficiency < 1


def test_int8_is_planned_as_it_is_started_and_compared_with_itself_and_bf16(capsys):
    plan = plan_of(gpus=2, matmul="int8")
    assert 0.9 < plan.efficiency < 1
    gain = plan.gain_of_int8
    assert gain.best == pytest.approx(
        plan.prediction.tokens_per_second / plan_of(gpus=2).prediction.tokens_per_second
    )
    assert 1.23 < gain.low < gain.best < gain.high < 1.4
    main(["--option", "a", "--matmul", "int8"])
    out = " ".join(capsys.readouterr().out.split())
    assert "times as fast as with --matmul bf16, 1.27 to 1.42." in out
    assert out.count("int8 matmuls 3.44 times") == 2  # as a cause, and in what it rests on
    text = document(analyse(PlanConfig(matmul="int8")), "files")
    assert "-m hamner.train --option a --matmul int8 --tokens" in text
    with pytest.raises(UserError, match="--matmul int8: the int8 rate of the custom GPU is not"):
        plan_of(**CUSTOM, matmul="int8")


def test_batch_size_is_of_all_gpus():
    one, two = plan_of(batch_size=12), plan_of(gpus=2, batch_size=24)
    assert two.rows_per_gpu == one.rows_per_gpu == 12
    assert two.config.tokens_per_step == 2 * one.config.tokens_per_step
    assert plan_of(batch_size=48).steps == one.steps // 4


def test_auto_shards_what_does_not_fit_one_gpu():
    plan = plan_of(gpus=4, vram_budget=4)
    assert plan.parallelism.kind == "fsdp"
    assert plan.memory.account.total <= 4 * GIB
    assert plan.efficiency is None
    with pytest.raises(UserError, match="too small"):
        plan_of(gpus=4, vram_budget=4, parallel="ddp")
    # A node of one GPU has nothing to shard over.
    with pytest.raises(UserError, match="too small"):
        plan_of(nodes=4, vram_budget=4)


def test_slow_links_are_made_up_for_by_micro_batches():
    slow = plan_of(gpus=4, link=2.5)
    assert slow.communication_share > 0.4
    quiet = slow.with_quiet_communication()
    assert quiet.communication_share < 0.05
    assert quiet.memory.policies == slow.memory.policies
    assert quiet.rows_per_gpu // quiet.memory.micro_batch_size > 1
    half = replace(quiet.config, batch_size=quiet.config.batch_size // 2)
    earlier = make_plan(half, RTX_3090, slow.parallelism, policies=slow.memory.policies)
    assert earlier.communication_share >= 0.05
    assert plan_of(gpus=4, link=1, parallel="fsdp").with_quiet_communication() is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"option": "d"}, "--option d is not one of tiny, current, a,"),
        ({"gpu": "rtx-9999"}, "--gpu rtx-9999 is not one of rtx-3090,"),
        ({"gpu": "custom"}, "--gpu custom needs --gpu-spec"),
        (
            {"gpu": "custom", "gpu_spec": (1.0, 0.0, 1.0, 1.0)},
            "--gpu-spec 1 0 1 1 must be between 0.001 and 1,000,000",
        ),
        ({"gpu": "custom", "gpu_spec": (1.0, math.nan, 1.0, 1.0)}, "--gpu-spec 1 nan 1 1 must be"),
        ({"gpu": "custom", "gpu_spec": (1.0, 1.0, 1e300, 1.0)}, "--gpu-spec 1 1 1e+300 1 must be"),
        (
            {"gpu": "custom", "gpu_spec": (100.0, 1000.0, 1.5, 50.0)},
            "--vram-budget: 2 GiB are left to the desktop by default, and the custom GPU has 1.5;",
        ),
        ({"gpu_spec": (1.0, 1.0, 1.0, 1.0)}, "use it with --gpu custom, not rtx-3090"),
        ({"tokens": 100.0}, "--tokens 100 must be at least one step of option a, 24,576"),
        ({"tokens": math.inf}, "--tokens inf must be"),
        ({"tokens": 1e16}, "and at most 1e+15"),
        ({"tokens": math.nan}, "--tokens nan must be"),
        ({"vram_budget": 0.0}, "--vram-budget 0 GiB must be above 0 and at most the 24 GiB"),
        ({"vram_budget": 48.0}, "--vram-budget 48 GiB must be above 0 and at most the 24 GiB"),
        ({"vram_budget": 1.0}, "--vram-budget 1 GiB is too small"),
        ({"option": "all", "vram_budget": 1.0}, "--vram-budget 1 GiB is too small"),
        ({"option": "all", "metrics": "m.jsonl"}, "--metrics needs the --option"),
        ({"gpus": 0}, "--gpus 0 must be above 0"),
        ({"nodes": -1}, "--nodes -1 must be above 0"),
        ({"batch_size": 0}, "--batch-size 0 must be above 0"),
        ({"gpus": 2, "link": 0.0}, "--link 0 must be between 0.001 and 1,000,000 GB/s"),
        ({"gpus": 2, "link": 1e-320}, "--link 9.99989e-321 must be between"),
        ({"nodes": 2, "network": math.inf}, "--network inf must be between"),
        ({"nodes": 2, "parallel": "fsdp"}, "--parallel fsdp shards the model over the GPUs"),
        ({"gpus": 5}, "--batch-size 24 is shared by all GPUs and must be a multiple of their"),
        ({"gpus": 5}, "number, 5: try --batch-size 25"),
        # What is wrong is not that int8 cannot be sharded.
        ({"gpus": 5, "matmul": "int8"}, "--batch-size 24 is shared by all GPUs"),
        (CUSTOM | {"gpus": 2, "matmul": "int8"}, "the int8 rate of the custom GPU is not known"),
        ({"gpus": 4, "matmul": "int8", "vram_budget": 4.0}, "--matmul int8 trains with --parallel"),
        ({"clock": 0.0}, "--clock 0 must be above 0 and finite"),
        ({"clock": 15e3}, "--clock 15000 is more than 2 times the 1,695 MHz of the RTX 3090: give"),
        ({"power_limit": 2800.0}, "--power-limit 2800 is more than 2 times the 350 W of the RTX"),
        (
            {"clock": 1.7},
            "--clock 1.7 is less than 0.1 times the 1,695 MHz of the RTX 3090: give MHz",
        ),
        (
            {"power_limit": 0.35},
            "--power-limit 0.35 is less than 0.1 times the 350 W of the RTX 3090",
        ),
        ({"power_limit": math.nan}, "--power-limit nan must be above 0 and finite"),
        ({"clock": 1500.0, "power_limit": 280.0}, "--power-limit is there to guess the clock"),
        (CUSTOM | {"clock": 1500.0}, "--clock 1500: the clock of the custom GPU is not known"),
        (CUSTOM | {"power_limit": 280.0}, "--power-limit 280: the power limit of the custom GPU"),
        ({"report_card": Path("no.json")}, "--report-card no.json cannot be read"),
        ({"report_card": Path("no.json"), "gpu": "h100"}, "leave out --gpu and --gpu-spec"),
    ],
)
def test_bad_input(flags, message):
    with pytest.raises(UserError) as error:
        analyse(PlanConfig(**flags))
    assert message in str(error.value)


def test_command_prints_the_plan_without_torch():
    output = output_without(["torch"], "hamner.plan", "--option", "a")
    speed = make_plan(OPTIONS["a"], RTX_3090).prediction.tokens_per_second
    for text in ("320.9M", "406,901", "selective", f"{speed:,.0f}", "6.42B", "projected"):
        assert text in output


def test_command_says_between_which_speeds_and_why(capsys):
    main([])
    out = " ".join(capsys.readouterr().out.split())
    expected = make_plan(OPTIONS["a"], RTX_3090).prediction.interval
    low, high = f"{expected.low:,.0f}", f"{expected.high:,.0f}"
    assert f"tokens/s, low-high {low}-{high}" in out
    assert f"of option a should reach {low} to {high} tokens/s and take" in out
    for cause in expected.causes:
        assert f"{cause.name} {cause.slowest:+.0%} to {cause.fastest:+.0%} (" in out
    days = [1e10 / speed / 86_400 for speed in (expected.best, expected.high, expected.low)]
    assert "days (projected) {:.1f} days, low-high {:.1f}-{:.1f}".format(*days) in out
    # Of less than a day in hundredths, all three.
    main(["--gpu", "h200"])
    out = " ".join(capsys.readouterr().out.split())
    expected = make_plan(OPTIONS["a"], GPUS["h200"]).prediction.interval
    days = [1e10 / speed / 86_400 for speed in (expected.best, expected.high, expected.low)]
    assert "days (projected) {:.2f} days, low-high {:.2f}-{:.2f}".format(*days) in out


def test_command_plans_at_a_power_limit_a_clock_and_from_a_report_card(capsys, tmp_path):
    def best(*flags):
        main(list(flags))
        out = " ".join(capsys.readouterr().out.split())
        return float(re.search(r"tokens/s \(projected\) ([\d,]+)", out)[1].replace(",", "")), out

    whole, _ = best()
    limited, out = best("--power-limit", "280")
    # Puget Systems 2020: 95% of the training speed at 280 of 350 W.
    assert limited / whole == pytest.approx(0.95, abs=0.02)
    assert "(limited to 280 of 350 W, taken as a clock of 93%" in out
    slow, out = best("--clock", "1395")
    assert 1395 / 1695 < slow / whole < 0.87
    assert "(held at 1,395 MHz, 82% of 1,695)" in out
    CARD.write(tmp_path / "card.json")
    own, out = best("--report-card", str(tmp_path / "card.json"))
    assert own == pytest.approx(CARD.step.tokens_per_second, rel=1e-3)
    assert "kernel efficiencies measured on this NVIDIA GeForce RTX 3090 on 2026-11-29" in out
    # That is said of the table's efficiencies.
    assert "on this card -5%" in best()[1]
    assert "on this card -5%" not in out


def test_the_page_has_the_projections():
    intervals = [make_plan(OPTIONS[name], RTX_3090).prediction.interval for name in COMPARED]
    rows = {
        "tokens/s": [f"{interval.best:,.0f}" for interval in intervals],
        "nine of ten between": [f"{i.low:,.0f}–{i.high:,.0f}" for i in intervals],
    }
    page = (Path(__file__).parents[2] / "docs/planning.md").read_text().splitlines()
    for name, cells in rows.items():
        assert f"| {name} | {' | '.join(cells)} |" in page


def test_help_names_the_cards(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert ", ".join(GPUS) in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_command_compares_all(capsys):
    main(["--option", "all", "--gpu", "h100"])
    out = capsys.readouterr().out
    assert all(name in out for name in COMPARED)
    assert all(count in out for count in ("210.9M", "281.6M", "16,384", "6.42B"))
    assert "Recommended: a, 320.9M parameters" in out
    assert "runs of option a should reach" in out


def test_command_says_what_several_gpus_send(capsys):
    main(["--gpus", "2"])
    out = " ".join(capsys.readouterr().out.split())
    assert "2 x RTX 3090, bf16" in out
    assert "sends 0.64 GB a step in 64.2 ms at 10 GB/s between the GPUs of a node" in out
    assert "PCIe 4.0 x16 through host memory, assumed" in out
    assert "--batch-size" not in out
    main(["--gpus", "4", "--link", "2.5"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--batch-size 384 --micro-batch-size 32 in hamner.train" in out
    main(["--gpus", "2", "--nodes", "2", "--batch-size", "96", "--parallel", "fsdp"])
    out = " ".join(capsys.readouterr().out.split())
    assert "2 nodes of 2 x RTX 3090" in out
    assert "1.25 GB/s between nodes (--network)" in out
    main(["--gpus", "4", "--link", "1", "--parallel", "fsdp"])
    out = " ".join(capsys.readouterr().out.split())
    assert "No batch up to 64 times as large fits and brings that under 5%" in out


def test_one_gpu_hears_nothing_of_several(capsys):
    main([])
    out = capsys.readouterr().out
    for word in ("ommunication", "efficiency", "per GPU", "of each"):
        assert word not in out


def test_command_reads_metrics(capsys, metrics):
    main(["--option", "current", "--metrics", str(metrics)])
    out = capsys.readouterr().out
    assert "after 2.45B tokens" in out
    assert "Near the capacity wall" in out
    assert "loss 3.5 (perplexity 33)" in out


def test_a_run_is_taken_for_what_its_own_configuration_says(metrics):
    model = replace(OPTIONS["current"].model, num_layers=10)
    config = replace(OPTIONS["current"], model=model)
    metrics.with_name("config.json").write_text(json.dumps(asdict(config), default=str))
    run = analyse(PlanConfig(option="current", metrics=metrics)).run
    assert run.parameters == model.num_parameters()
    with pytest.raises(UserError, match="of a run of option current, not of --option a: give"):
        analyse(PlanConfig(option="a", metrics=metrics))
    metrics.with_name("config.json").write_text("{")
    run = analyse(PlanConfig(option="a", metrics=metrics)).run
    assert run.parameters == OPTIONS["a"].model.num_parameters()


def test_command_does_not_sell_a_larger_model_to_wrong_labels(capsys, tmp_path):
    """The log is as another trainer wrote it: means of 100 steps, labels shifted twice."""
    path, (tokens, losses) = tmp_path / "log.csv", SHIFTED_TWICE
    at = np.linspace(2.4576e6, 2.45e9, 997)
    rows = zip(at / 24_576, np.interp(at, tokens, losses), at, strict=True)
    text = "".join(f"{step:.0f},{loss},{t},{min(2e-4, t / 2e11)}\n" for step, loss, t in rows)
    path.write_text(f"step,loss,tokens_total,learning_rate\n{text}")
    main(["--option", "current", "--metrics", str(path)])
    report = document(analyse(PlanConfig(option="current", metrics=path)), "plan_files")
    for said in (capsys.readouterr().out, report):
        said = " ".join(said.split())
        assert "Check labels and data before you buy a larger model" in said
        for word in ("wall", "reached after", "80% interval", "end of the run so far"):
            assert word not in said


def test_command_promises_nothing_of_a_loss_that_does_not_fall(capsys, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        f'{{"step": {i}, "tokens": {i * 1e7}, "loss": {3.4 + i / 1e3}}}' for i in range(1, 200)
    ]
    path.write_text("\n".join(lines))
    main(["--option", "current", "--metrics", str(path)])
    out = capsys.readouterr().out
    assert "The loss is not falling" in out
    assert "reached after" not in out
    assert "80% interval" not in out


def test_exit_codes():
    assert "a custom card" in run_command("--help").stdout
    bad = run_command("--gpu", "abacus", code=2)
    assert bad.stderr.startswith("error: --gpu abacus is not one of")
    assert "Traceback" not in bad.stderr
    run_command("--no-such-flag", code=2)
