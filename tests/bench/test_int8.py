"""Numerics of int8: what is measured, and controls that fail."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import int8_gradients, int8_loss, recipe_runs
from bench.int8_gradients import ARMS, Measured, compare, measure, one_scale_linear, summarize
from bench.int8_loss_report import describe, slope_of
from bench.recipe_trials import MODELS, Scope, plan
from bench.recipes import COMMITTED, read_results
from hamner.checkpoint.run_folder import append_record
from hamner.config.options import for_option
from hamner.data.batch import Batch
from hamner.errors import UserError
from hamner.kernels import int8_linear, swiglu_linear
from tests.models import DENSE

CPU = torch.device("cpu")
CONFIG = replace(
    for_option("tiny"),
    model=replace(DENSE, hidden_size=32, num_layers=1, expert_intermediate_size=48, max_seq_len=24),
    seq_len=24,
    batch_size=1,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def noise_db(found: torch.Tensor, exact: torch.Tensor) -> float:
    return compare({"": found}, {"": exact})[""]["snr_db"]


def test_every_arm_is_held_against_fp32(monkeypatch):
    monkeypatch.setattr(int8_gradients, "OUTLIER_TOKENS", 24)
    inputs, targets = torch.randint(128, (2, 1, 24), generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs, targets, torch.zeros(1, 24, dtype=torch.int32))
    found = dict(measure(CONFIG, batch, CPU, None, outliers=True))
    assert tuple(found) == ARMS
    weight = "layers.0.mlp.gate_up_proj.weight"
    noise = {arm: measured.gradients[weight]["snr_db"] for arm, measured in found.items()}
    # On a CPU bf16's arm is the kernels in fp32.
    assert min(row["snr_db"] for row in found["bf16"].gradients.values()) > 100
    assert 100 > noise["int8"] > noise["int8-all"] > 25
    assert all(row["cosine"] > 0.98 for row in found["int8-all"].gradients.values())
    assert noise["one scale on down"] < noise["int8"]
    assert [arm for arm in ARMS if found[arm].added] == ["int8-all", "no chunks"]


def test_what_weight_gradients_add_is_held_against_int8(monkeypatch):
    """Of two groups of tokens the second, short one has the large gradients."""
    monkeypatch.setattr(int8_gradients, "ARMS", ("int8", "int8-all", "no chunks"))
    # Half of the time in the interpreter, and of no use here.
    module = importlib.import_module("hamner.kernels.int8_linear")
    monkeypatch.setattr(module, "launch_quantization_error", lambda *_, **__: None)
    tokens = int8_gradients.GROUP.value + 8
    config = replace(CONFIG, model=replace(CONFIG.model, max_seq_len=tokens), seq_len=tokens)
    inputs, targets = torch.randint(128, (2, 1, tokens), generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs, targets, torch.zeros(1, tokens, dtype=torch.int32))
    int8, ours, control = dict(measure(config, batch, CPU, None, outliers=True)).values()
    for table in (ours.added, control.added):
        linears = [name.removeprefix("layers.0.").partition(".")[2] for name in table]
        assert linears == [f"{x}_proj.weight" for x in ("qkv", "o", "gate_up", "down")]
    # All else is as with int8, and so were what the weight gradients are products of.
    for name in int8.gradients.keys() - ours.added.keys():
        assert int8.gradients[name] == ours.gradients[name] == control.gradients[name]
    # Against fp32 there is int8's noise as well.
    for name, row in ours.added.items():
        assert row["snr_db"] > ours.gradients[name]["snr_db"]
    noise = [m.added["layers.0.mlp.down_proj.weight"]["snr_db"] for m in (ours, control)]
    assert noise[0] > noise[1] + int8_gradients.FAILS_DB


def test_one_token_of_so_many_has_large_gradients(monkeypatch):
    """They are counted through rows that are shorter than that, too."""
    monkeypatch.setattr(int8_gradients, "OUTLIER_TOKENS", 32)
    x = torch.ones(3, 24, 2, requires_grad=True)
    y, routing = int8_gradients._enlarge_some(None, None, (x, None))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    large = (gradient == int8_gradients.TOKEN_FACTOR).all(dim=2)
    assert routing is None
    assert large.nonzero().tolist() == [[0, 8], [1, 16]]
    assert (gradient[~large] == 1.0).all()


def test_down_needs_scales_for_its_outliers():
    h, weight = normal(40, 600).detach(), normal(16, 600, seed=1)
    h[:, 7] *= 100.0
    exact = h @ weight.detach().T
    gate_up = torch.cat((torch.full_like(h, 30.0), h / 30.0), dim=1)  # whose SwiGLU is h
    ours = swiglu_linear(gate_up, weight, matmul="int8").detach()
    control = one_scale_linear(h, weight).detach()
    assert noise_db(ours, exact) > noise_db(control, exact) + int8_gradients.FAILS_DB


def test_weight_gradients_need_chunks():
    x, weight, d_out = normal(1100, 16), normal(12, 16, seed=1), normal(1100, 12, seed=2).detach()
    d_out[300] *= 100.0

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(int8_linear(x, weight, "int8-all"), weight, d_out)[0]

    exact, ours = d_out.T @ x.detach(), gradient()
    with int8_gradients.without_chunks():
        control = gradient()
    assert noise_db(ours, exact) > noise_db(control, exact) + int8_gradients.FAILS_DB
    assert torch.equal(gradient(), ours)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--option", "c"), "--option c: a mixture has no down"),
        (("--option", "tiny", "--rows", "1"), "--rows 1: weight gradients have a scale each 256"),
    ],
)
def test_what_says_nothing_is_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        int8_gradients.main(["--output", str(tmp_path / "out.jsonl"), *flags])
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match="--output .*: the folder .* does not exist"):
        int8_gradients.main(["--output", str(tmp_path / "none" / "out.jsonl"), "--option", "c"])


def test_a_runs_own_micro_batch_does_not_matter(tmp_path, monkeypatch):
    config = replace(CONFIG, batch_size=32, micro_batch_size=32)
    saved = SimpleNamespace(config=config, tokenizer=None, name="run")
    monkeypatch.setattr(int8_gradients, "find_saved_model", lambda _: saved)
    monkeypatch.setattr(int8_gradients, "measure", lambda *_, **__: iter(()))
    monkeypatch.setattr(int8_gradients, "summarize", lambda _: [])
    asked = []

    def open_loader(config, tokenizer, pin_memory):
        asked.append((config.batch_size, config.micro_batch_size))
        return SimpleNamespace(next_batch=lambda: None, close=lambda: None)

    monkeypatch.setattr(int8_gradients, "open_loader", open_loader)
    output = ("--output", str(tmp_path / "out.jsonl"))
    int8_gradients.main([*output, "--checkpoint", str(tmp_path), "--rows", "12"])
    assert asked == [(12, None)]


def test_summary_says_whether_controls_failed():
    names = [f"layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate_up", "down")]

    def table(snr_db: float) -> dict:
        return {name: {"cosine": 0.999, "snr_db": snr_db} for name in names}

    arms = dict.fromkeys(ARMS, Measured(table(20.0), None))
    arms["one scale on down"] = Measured(table(16.0), None)
    # Against fp32 alike, whatever their weight gradients add.
    arms["int8-all"] = Measured(table(20.0), table(30.0))
    arms["no chunks"] = Measured(table(20.0), table(22.0))
    lines = summarize(arms)
    assert len(lines) == 2 * (len(ARMS) + 2) + 2
    assert "no chunks, added     22.0 dB (worst   22.0), cosine 0.99900" in lines[len(ARMS) + 1]
    assert "one scale on down: fails visibly, 4.0 dB noisier than int8 (" in lines[-2]
    assert "no chunks: fails visibly, 8.0 dB more noise added than by int8-all (" in lines[-1]
    arms["no chunks"] = Measured(table(10.0), table(29.0))
    assert "no chunks: DOES NOT FAIL, 1.0 dB more noise" in summarize(arms)[-1]


def result(trial, loss: float | None, drift: float = 0.0) -> dict:
    """The line of a run that was not made, whose training loss drifts from bf16's."""
    steps = [trial.tokens * i // 30 for i in range(1, 31)]
    return {
        **vars(trial),
        "val_loss": loss,
        "diverged": loss is None,
        "tokens_per_second": 110 if drift else 100,
        "seconds": 1.0,
        "steps": 20,
        "curve": [[tokens, 5.0 + trial.seed + drift * tokens / 100e6, None] for tokens in steps],
        "batch_size": 24,
        "seq_len": 1024,
        "parameters": 164_000_000,
        "bits_per_byte": None,
        "data": {},
        "conditions": {},
    }


FALLEN = {
    0: [[3, "o", "input", 2], [3, "o", "weight", 2], [19, "o", "gradient", 11]],
    1: [],
}
"""by seed: two operands of one matmul, and one of another; the row of the last does not say"""
SETTINGS = int8_loss.RunConfig(data=("x",), validation=Path("y"))


def test_arms_of_a_seed_differ_in_their_arithmetic_alone():
    found = int8_loss.trials(SETTINGS, ["--qk-norm"], {})
    assert [(t.seed, t.matmul) for t in found] == [
        (seed, matmul) for seed in (0, 1, 2) for matmul in ("bf16", "int8", "int8-all")
    ]
    assert len({replace(t, flags=t.flags[:-1]).key for t in found}) == 3
    assert all("--qk-norm" in t.flags for t in found)


def test_report_of_pairs(tmp_path, capsys):
    bf16 = {0: 4.00, 1: 4.02, 2: 4.04}
    gaps = {"int8": (0.003, 0.004, 0.005), "int8-all": (0.02, 0.03, 0.04)}
    for trial in int8_loss.trials(SETTINGS, ["--num-layers", "40"], {}):
        matmul, loss, drift = trial.matmul, bf16[trial.seed], 0.0
        if matmul != "bf16":
            loss, drift = loss + gaps[matmul][trial.seed], 0.002
        line = result(trial, None if (matmul, trial.seed) == ("int8-all", 2) else loss, drift)
        if matmul == "int8" and trial.seed in FALLEN:
            line |= {"int8_fallback": FALLEN[trial.seed]}
        append_record(tmp_path / "results.jsonl", line)
    assert int8_loss.main(["report", str(tmp_path), "--speed", "int8-all", "1.6"]) == 0
    said = capsys.readouterr().out
    assert "bf16: 4.0200 over 3 seeds, standard deviation 0.0200" in said
    assert (
        "int8: gap +0.0040 (+0.0015 to +0.0065) nats a token over 3 seeds, small, but it grows"
        in said
    )
    assert "slope +0.0020 (+0.0020 to +0.0020) per 100M tokens" in said
    # At 10B tokens the law falls by 0.168 nats an e-fold: 0.004 nats are 2.4% of the tokens.
    # o's outputs are 768 of 8,192 of a layer, and each of 40 layers has two products.
    stays = 1 - (19 / 20 + 10 / 20) * 768 / (2 * 8192 * 40) / 2
    assert f"int8: {stays:.1%} of its products stayed int8" in said
    assert "operands that went back to bf16: 3 of seed 0, 0 of seed 1\n" in said
    assert "int8: 1.100 times bf16's tokens/s, 1.074 net" in said
    assert "bf16 has that loss after 97.7% of 10B tokens" in said
    assert "int8-all: 1 of 3 runs diverged" in said
    assert (
        "int8-all: gap +0.0250 (-0.0385 to +0.0885) nats a token over 2 seeds" in said
        and "too much to ship" in said
    )
    assert "int8-all: 1.600 times" in said
    with pytest.raises(UserError, match="--speed fp8 2: give one of int8, int8-all"):
        int8_loss.main(["report", str(tmp_path), "--speed", "fp8", "2"])


@pytest.mark.parametrize("part", ["ladder", "long"])
def test_runs_of_recipes_are_no_arms(part, tmp_path):
    trial = replace(int8_loss.trials(SETTINGS, [], {})[0], part=part, flags=MODELS[part])
    append_record(tmp_path / "results.jsonl", result(trial, 4.0))
    with pytest.raises(UserError, match="has runs of bench.recipes, .* bench.recipes report"):
        int8_loss.main(["report", str(tmp_path)])


def test_the_slope_of_one_seed_has_an_interval_of_its_own():
    tokens = [i * 1_000_000 for i in range(100)]
    noise = [0.001 * (-1) ** i for i in range(100)]
    slope, half = slope_of(tokens, [2e-11 * t + noise[i] for i, t in enumerate(tokens)])
    assert 0 < abs(slope - 0.002) < half < 0.001
    assert all(map(math.isnan, slope_of(tokens[:7], noise[:7])))
    base, other = (result(int8_loss.trials(SETTINGS, [], {})[0], loss) for loss in (4.0, 4.003))
    (line, _) = describe({"bf16": {0: base}, "int8": {0: other}}, {})[1:]
    assert "gap +0.0030 (no interval) nats a token over 1 seeds, as wanted; slope +0.0000" in line
    # Without a slope nothing says that it is as wanted, and without bf16 nothing says anything.
    base["curve"] = base["curve"][-7:]
    (line, _) = describe({"bf16": {0: base}, "int8": {0: other}}, {})[1:]
    assert line.endswith("nats a token over 1 seeds, small so far; slope not known per 100M tokens")
    (line,) = describe({"bf16": {}, "int8": {0: other}}, {})
    assert line == "int8: no run in bf16 of the same seed to compare with yet"


def test_runs_go_on_where_they_were_left(tmp_path, monkeypatch, capsys):
    """Each call does what time allows, and only what is not done."""
    made, answers = [], [{}, None]
    monkeypatch.setattr(recipe_runs, "prepare_data", lambda *_: SimpleNamespace(digest="d"))

    def run(trial, data, folder, end):
        folder.mkdir(parents=True, exist_ok=True)
        made.append((trial.seed, trial.matmul))
        is_done = answers.pop(0) is not None if answers else True
        return result(trial, 4.0) | {"data": {"digest": "d"}} if is_done else None

    monkeypatch.setattr(recipe_runs, "run", run)
    args = ["run", "--data", "x", "--validation", "y", "--output", str(tmp_path), "--seeds", "0"]
    args += ["--option", "tiny", "--recipe", "adamw"]
    int8_loss.main(args)
    said = capsys.readouterr().out
    assert "2 runs are left" in said and "-bf16: 4.0000 nats a token, 100 tokens/s" in said
    int8_loss.main(args)
    assert made == [(0, "bf16"), (0, "int8"), (0, "int8"), (0, "int8-all")]
    assert "done" in capsys.readouterr().out
    assert [path.name[-4:] for path in (tmp_path / "runs").iterdir()] == ["bf16"]


class LongRun:
    """The run of `bench.recipes long` is known, and `start` begins its int8 arm."""

    def __init__(self, recipe: str, folder: Path, monkeypatch) -> None:
        self.known, self.output, self.recipe = folder / "known", folder / "out", recipe
        self.known.mkdir()
        self.made, self.monkeypatch = [], monkeypatch
        scope = Scope("long", (recipe,), (250_000_000,), (0,))
        before = [found for found in read_results(COMMITTED) if found["part"] != "long"]
        (trial,) = plan(scope, before)
        self.config = recipe_runs.configure(trial, self.output)
        data = {"data": {"digest": "d", "train_tokens": 1}}
        self.line = {**result(trial, 4.0), **recipe_runs.settings_of(self.config), **data}
        monkeypatch.setattr(recipe_runs, "run", self.run)

    def run(self, trial, data, folder, end) -> dict:
        folder.mkdir()
        self.made.append(recipe_runs.configure(trial, self.output))
        return {**self.line, **vars(trial), "val_loss": 4.003}

    def start(self, *flags: str, digest: str = "d", **changed) -> None:
        line = json.dumps(self.line | changed) + "\n"
        (self.known / "long.jsonl").write_text(line)
        data = SimpleNamespace(digest=digest, train_tokens=1)
        self.monkeypatch.setattr(recipe_runs, "prepare_data", lambda *_: data)
        args = ["run", "--data", "x", "--validation", "y", "--output", str(self.output)]
        args += ["--option", "a", "--recipe", self.recipe, "--seeds", "0", "--tokens", "250e6"]
        int8_loss.main([*args, "--matmuls", "int8", "--known", str(self.known), *flags])


@pytest.mark.parametrize(("recipe", "decay"), [("plan", 0.1), ("muon", 0.3)])
def test_a_run_of_the_long_pair_is_the_arm_in_bf16(recipe, decay, tmp_path, monkeypatch, capsys):
    """It is not trained again, and the arm in int8 differs from it in its arithmetic alone."""
    run = LongRun(recipe, tmp_path, monkeypatch)
    for _ in range(2):
        run.start()
    assert run.made == [replace(run.config, matmul="int8")]
    # What was trained first stays, as bf16's run does where it is trained here.
    assert [path.name[-4:] for path in (run.output / "runs").iterdir()] == ["int8"]
    assert run.config.weight_decay == decay
    assert len(read_results(run.output)) == 2
    capsys.readouterr()
    int8_loss.main(["report", str(run.output)])
    said = capsys.readouterr().out
    assert f"weight decay {decay:g}, 250M tokens\n  bf16: 4.0000 over 1 seeds" in said
    assert "int8: gap +0.0030 (no interval) nats a token over 1 seeds" in said


def test_another_run_is_no_arm_in_bf16(tmp_path, monkeypatch):
    run = LongRun("plan", tmp_path, monkeypatch)
    for flag, message in {
        ("--seeds", "1"): "no run of bench.recipes long of plan, seed 1, 250M tokens",
        ("--hidden-size", "512"): "arithmetic: hidden_size is 1024 there, 512 here, parameters",
        ("--grad-clip", "512"): "in more than arithmetic: grad_clip is 1.0 there, 512.0 here;",
    }.items():
        with pytest.raises(UserError, match=message):
            run.start(*flag)
    recipe = run.line["recipe"] | {"warmup_steps": 8}
    with pytest.raises(
        UserError, match="arithmetic: steps is 9 there, 10172 here, warmup_steps is 8"
    ):
        run.start(steps=9, recipe=recipe)
    with pytest.raises(UserError, match="were measured on other documents"):
        run.start(digest="e")
    assert not run.made and not (run.output / "results.jsonl").exists()
    run.start()
    with pytest.raises(UserError, match="in more than arithmetic: the data;"):
        run.start(data={"digest": "e"})
