"""`python -m hamner.train` as a user meets it: a real process."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

from hamner.checkpoint import format as checkpoint
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.profile import __main__ as profile
from hamner.train.__main__ import parse
from tests import forked
from tests.corpus import write_predictable
from tests.imports import output_without

SMALL = [
    *("--option", "tiny", "--hidden-size", "64", "--num-layers", "2"),
    *("--expert-intermediate-size", "128", "--vocab-size", "261", "--max-seq-len", "64"),
    *("--seq-len", "64", "--eval-tokens", "512", "--val-fraction", "0.1"),
    *("--sample-every", "0", "--device", "cpu"),
]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "hamner.train", *args]


run = partial(forked.run_module, "hamner.train")


def test_scripts_import_the_command_from_its_package():
    from hamner.train import main
    from hamner.train.__main__ import main as command

    assert main is command
    with pytest.raises(ImportError):
        from hamner.train import nothing  # noqa: F401


def test_help_explains_every_flag_without_loading_torch():
    output = output_without(["torch", "hamner.train.loop"], "hamner.train", "--help")
    texts = re.split(r"^│ (?=--)", output, flags=re.MULTILINE)[1:]
    flags = {text.split()[0]: text for text in texts}
    assert {"--option", "--data", "--batch-size", "--hidden-size", "--rope-theta"} <= set(flags)
    # Those of the others are in words, or there is none.
    words = {name for name, text in flags.items() if "(default: " not in text}
    assert words == {
        *("--run-dir", "--steps", "--tokens", "--stop-after", "--replay", "--init-from"),
        *("--embedding-lr", "--vector-lr", "--embedding-weight-decay", "--micro-batch-size"),
        *("--vram-budget", "--report-to"),
    }


def test_defaults_are_the_options():
    assert parse([]).batch_size == 24
    assert parse(["--option", "current"]).batch_size == 48
    assert parse(["--option=b"]).model.num_layers == 36
    changed = parse(["--option", "b", "--num-layers", "12", "--rope-theta", "5e5"])
    assert changed.model.num_layers == 12
    assert changed.model.rope_theta == 5e5


def test_a_recipe_may_change_the_model():
    assert not any(parse(["--recipe", recipe]).model.qk_norm for recipe in ("plan", "adamw"))
    assert parse(["--option", "c", "--recipe", "muon"]).model.qk_norm
    assert not parse(["--recipe", "muon", "--no-qk-norm"]).model.qk_norm
    assert profile.parse(["--recipe", "muon"]).training().model.qk_norm
    differential = parse(["--recipe", "muon", "--use-differential-attention"]).model
    assert (differential.use_differential_attention, differential.qk_norm) == (True, False)
    with pytest.raises(UserError, match="--qk-norm and --use-differential-attention do not go"):
        parse(["--recipe", "muon", "--use-differential-attention", "--qk-norm"])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_resume_keeps_the_model_whatever_the_recipe_changes_now(tmp_path, qk_norm):
    flag = "--qk-norm" if qk_norm else "--no-qk-norm"
    config = parse(["--option", "tiny", "--recipe", "muon", flag, "--run-dir", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert parse(["--resume", "--run-dir", str(tmp_path)]).model.qk_norm == qk_norm


def test_data_may_be_repeated_or_listed():
    args = ["--data", "a", "b", "--seed", "1", "--data", "c", "--data=d=0.5"]
    assert parse(args).data == ("a", "b", "c", "d=0.5")
    assert parse(["--data", "x.txt=0.9", "--data", "y.txt=0.1"]).data == ("x.txt=0.9", "y.txt=0.1")


@pytest.fixture
def stopped(tmp_path) -> TrainConfig:
    """The configuration of a run that was started with flags unlike its option's, and moved."""
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    args = ["--option", "tiny", "--steps", "40", "--batch-size", "2", "--lr", "1e-5"]
    once = ["--stop_after", "2", "--allow-data-change"]
    config = parse([*args, "--min-lr=1e-6", *once, "--run-dir", "elsewhere"])
    (run / "config.json").write_text(json.dumps(config.to_json()))
    return replace(config, run_dir=run, resume=True, stop_after=None, allow_data_change=False)


@pytest.mark.parametrize(
    "args",
    [
        ["--resume", "--run-dir", "RUN"],
        ["--run_dir", "RUN", "--resume"],
        ["--run_dir=RUN", "--option=tiny", "--no-resume", "--resume"],
        ["--run-dir", "runs/other", "--resume", "--run-dir=RUN"],
        ["--option", "b", "--resume", "--option=tiny"],
    ],
)
def test_a_resume_changes_no_flag_that_was_not_given(stopped, args, monkeypatch):
    monkeypatch.chdir(stopped.run_dir.parents[1])
    args = [argument.replace("RUN", str(stopped.run_dir)) for argument in args]
    config = parse(args)
    assert replace(config, run_dir=stopped.run_dir) == stopped
    assert config.folder.resolve() == stopped.run_dir
    assert parse([*args, "--keep_every", "9"]) == replace(config, keep_every=9)
    profiled = profile.parse(args).training()
    assert (profiled.lr, profiled.batch_size, profiled.steps) == (1e-5, 2, None)


def test_a_resume_may_change_the_length_either_way(stopped):
    config = parse(["--resume", "--run-dir", str(stopped.run_dir), "--tokens", "1e6"])
    assert config == replace(stopped, steps=None, tokens=1e6)


def test_a_resume_with_another_option_is_refused(stopped):
    args = ["--resume", "--run-dir", str(stopped.run_dir), "--option", "b"]
    with pytest.raises(UserError, match="--option b is not the tiny that .* was started with"):
        parse(args)


@pytest.mark.parametrize("name", ["None", ""])
def test_no_option_is_no_name_of_one(name):
    with pytest.raises(UserError, match=f"--option {name} is not one of tiny, current, "):
        parse(["--option", name])


def test_a_replay_has_the_flags_of_its_run(stopped):
    file = stopped.run_dir / "bad_steps" / "step.safetensors"
    file.parent.mkdir()
    file.touch()
    config = parse(["--option", "tiny", f"--replay={file}"])
    assert (config.replay, config.folder, config.lr) == (file, stopped.run_dir, 1e-5)


@pytest.mark.parametrize(
    ("flag", "value", "user"),
    [("--momentum", "0.9", "--optimizer muon"), ("--decay-fraction", "0.1", "--decay wsd")],
)
def test_a_flag_that_nothing_would_read_is_refused(flag, value, user):
    with pytest.raises(UserError, match=f"{flag} {value} does nothing with .* add {user}"):
        parse(["--option", "tiny", flag, value])
    config = parse(["--option", "tiny", flag, value, *user.split()])
    assert getattr(config, flag[2:].replace("-", "_")) == float(value)


MIXTURE = "--num-experts 2 --num-experts-per-token 1"


@pytest.mark.parametrize(
    ("unread", "beside", "mend"),
    [
        ("--rope-scaling-from 128", "--rope-scaling none", "--rope-scaling yarn"),
        ("--router-aux-loss-coef 0.1", "--num-experts 0", MIXTURE),
        ("--router-z-loss-coef 0.1", "--num-experts 0", MIXTURE),
        ("--router-aux-loss-coef 0.1", "--router-balance bias", f"{MIXTURE} --router-balance aux"),
        (
            "--router-bias-update-speed 0.1",
            "--router-balance aux",
            f"{MIXTURE} --router-balance bias",
        ),
        ("--no-gradient-checkpointing", "--recompute full", "--recompute none"),
        ("--ddp-bucket-mib 50", "--parallel fsdp", "--parallel ddp"),
        ("--no-fsdp-reshard", "--parallel ddp", "--parallel fsdp"),
        ("--keep-every 5", "--keep 0", "--keep 1"),
        ("--patience 3", "--eval-every 0", "--eval-every 1"),
        ("--patience 3", "--val-fraction 0.0", "--val-fraction 0.1"),
        ("--eval-every 5", "--val-fraction 0.0", "--val-fraction 0.1"),
    ],
)
def test_a_flag_without_effect_beside_another_is_refused(unread, beside, mend):
    tiny, args = ["--option", "tiny"], [*unread.split(), *beside.split()]
    if beside == "--router-balance bias":
        args += MIXTURE.split()
    with pytest.raises(UserError, match=f"^{unread} does nothing with {beside}: leave it out, or "):
        parse([*tiny, *args])
    parse([*tiny, *unread.split(), *mend.split()])
    # The value that it has anyway is nobody's wish.
    parse([*tiny, *args[len(unread.split()) :]])


def test_a_flag_that_asks_for_nothing_may_stand_beside_any():
    parse(["--option", "tiny", "--router-aux-loss-coef", "0", "--router-z-loss-coef", "0"])
    parse(["--option", "tiny", "--eval-every", "0", "--val-fraction", "0"])
    parse(["--option", "tiny", "--eval-tokens", "100", "--eval-every", "0"])


@pytest.mark.parametrize("beside", [["--resume"], ["--init-from", "runs/a"]])
def test_a_replay_starts_nothing(stopped, beside):
    file = stopped.run_dir / "bad_steps" / "step.safetensors"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(UserError, match=f"^{' '.join(beside)} does nothing with --replay {file}"):
        parse([f"--replay={file}", *beside])


def test_an_evaluation_has_a_sequence(tmp_path):
    """Of fewer tokens than one nothing would be evaluated."""
    args = ["--option", "tiny", "--run-dir", str(tmp_path)]
    sentence = "--eval-tokens 255 is less than one sequence of --seq-len 256"
    with pytest.raises(UserError, match=f"^{sentence}.* make it 256 or more"):
        parse([*args, "--eval-tokens", "255"])
    with pytest.raises(UserError, match="^--eval-tokens 20480 is less .* --seq-len 32768"):
        parse([*args, "--max-seq-len", "32768", "--seq-len", "32768"])
    assert parse([*args, "--eval-tokens", "256"]).eval_tokens == 256
    # A run of a version that did not refuse it goes on.
    config = replace(parse(args), eval_tokens=255)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert parse([*args, "--resume"]).eval_tokens == 255


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--option", "huge"], "--option huge"),
        (["--num-kv-heads", "5"], "--num-kv-heads 5"),
        (["--seq-len", "4096"], "--max-seq-len 1024"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--micro-batch-size", "7"], "--micro-batch-size 7"),
        (["--steps", "10", "--tokens", "1e6"], "--steps and --tokens"),
        (["--num-experts", "2", "--num-experts-per-token", "3"], "--num-experts-per-token 3"),
        (["--recompute", "some", "--device", "cpu"], "--recompute some"),
        (["--device", "cpu", "--precision", "bf16"], "--precision bf16"),
        (["--resume", "--run-dir", "nowhere"], "nowhere holds no run"),
        (["--option", "tiny", "--data", "missing.txt"], "missing.txt"),
        (["--option", "tiny", "--data", "builtin=0"], "builtin=0"),
        (["--data"], "--data has no value"),
        (["--data", "--steps", "10"], "--data has no value"),
        (["--replay", "gone.safetensors"], "--replay gone.safetensors: no such file"),
        (["--replay", __file__], "test_main.py is in no run: name a file of a RUN/bad_steps/"),
        (["--option", "tiny", "--tokenizer", "missing.json"], "--tokenizer missing.json"),
        (["--vram-budget", "0.01", "--device", "cpu"], "--vram-budget"),
        (["--val-fraction", "1.5"], "--val-fraction"),
        (["--keep-every", "5", "--keep", "0"], "--keep-every 5 does nothing with --keep 0"),
        (["--eval-tokens", "100"], "--eval-tokens 100 is less than one sequence of --seq-len 1024"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(args, named, tmp_path):
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_flag_is_exit_2():
    result = run("--batchsize", "3")
    assert result.returncode == 2
    assert "--batch-size" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def long_run(tmp_path):
    """Arguments of a run that lasts until it is interrupted."""
    data = write_predictable(tmp_path / "data.jsonl")
    return [*SMALL, "--data", str(data), "--run-dir", str(tmp_path / "run"), "--steps", "100000"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resumes(long_run, tmp_path, number):
    run_dir = tmp_path / "run"
    process = forked.Popen(
        command(*long_run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.wait_until((run_dir / "metrics.jsonl").exists)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    (saved,) = checkpoint.find(run_dir / "checkpoints")
    saved.verify()
    assert str(saved.path) in output
    assert "--resume" in output
    config = json.loads((run_dir / "config.json").read_text())
    assert config["steps"] == 100_000

    resumed = run("--resume", "--run-dir", str(run_dir), "--stop-after", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert f"from {saved.path}" in resumed.stdout
    assert checkpoint.find(run_dir / "checkpoints")[-1].step == saved.step + 2


def test_second_interrupt_leaves_at_once(long_run, tmp_path):
    run_dir = tmp_path / "run"
    process = forked.Popen(
        command(*long_run, "--save-every", "5"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.wait_until((run_dir / "metrics.jsonl").exists)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGTERM)
    for saved in checkpoint.find(run_dir / "checkpoints"):
        saved.verify()


def test_training_on_a_cpu_is_said_plainly(long_run):
    result = run(*long_run, "--stop-after", "2")
    assert result.returncode == 0
    assert "training on the CPU, which suits --option tiny only" in result.stdout
    assert re.search(r"measured on this CPU: about [\d,]+ tokens/s.*would take", result.stdout)
