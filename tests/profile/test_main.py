"""`python -m hamner.profile`: a real capture on the CPU, and what is read back."""

import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from hamner.data.chat_tokens import missing_chat_tokens
from hamner.errors import UserError
from hamner.profile import capture as capturing
from hamner.profile import steps
from hamner.profile.__main__ import ProfileConfig, main, parse
from hamner.profile.capture import capture
from hamner.profile.ranges import MODULES, Ranges
from hamner.profile.steps import open_steps, take
from hamner.profile.summary import summarize
from hamner.profile.trace import read_trace
from hamner.train import data as data_of_run
from tests import forked
from tests.corpus import write_predictable
from tests.imports import output_without
from tests.models import DENSE, build
from tests.profile.traces import TraceWriter
from tests.saved import save_run
from tests.tokenizers import foreign

SMALL = [
    *("--option", "tiny", "--hidden-size", "64", "--num-layers", "2", "--batch-size", "4"),
    *("--expert-intermediate-size", "128", "--vocab-size", "261", "--max-seq-len", "64"),
    *("--seq-len", "64", "--device", "cpu", "--micro-batch-size", "2", "--warmup", "1"),
]


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """The folder and the configuration of a capture of two steps of two micro-batches."""
    folder = tmp_path_factory.mktemp("profile")
    data = write_predictable(folder / "data.jsonl")
    config = parse([*SMALL, "--data", str(data)])
    capture(config.training(), folder / "out", steps=2, warmup=config.warmup)
    return folder / "out", config.training()


def test_capture_writes_everything(captured):
    out, config = captured
    names = {path.name for path in out.iterdir()}
    files = {"trace.json.gz", "memory.json.gz", "memory.png", "summary.md", "summary.json"}
    assert names == files
    assert (out / "memory.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "summary.json").read_text())
    assert written["config"]["batch_size"] == 4
    # Weights in fp32, two moments of the same size.
    parameters = config.model.num_parameters()
    assert written["peak"]["weights"] == 4 * parameters
    assert written["peak"]["optimizer state"] == 8 * parameters
    assert written["peak"]["gradients"] >= 4 * parameters
    assert "matmul" in (out / "summary.md").read_text()


def test_capture_finds_steps_phases_and_categories(captured):
    summary = summarize(read_trace(captured[0] / "trace.json.gz"))
    assert summary.steps == 2
    assert {"forward", "backward", "accumulate", "optimizer"} <= set(summary.phases)
    assert {"matmul", "attention", "loss", "optimizer"} <= set(summary.categories)
    assert sum(summary.categories.values()) <= summary.step_ms
    assert summary.tokens_per_second == pytest.approx(
        4 * 64 / summary.unprofiled_step_ms * 1e3, rel=1e-6
    )


def test_counted_matmul_flops_are_the_models(captured):
    """Shapes of every aten::mm of a step against the formula of the option, attention aside."""
    summary = summarize(read_trace(captured[0] / "trace.json.gz"))
    model = captured[1].model
    matmul = 6 * (
        model.num_layers * model.matmul_parameters_per_layer(active=True)
        + model.vocab_size * model.hidden_size
    )
    counted = summary.counted_tflops * 1e12 * summary.step_ms / 1e3
    assert counted == pytest.approx(matmul * 4 * 64, rel=1e-6)


def test_read_and_compare_print(captured, capsys, tmp_path):
    trace = captured[0] / "trace.json.gz"
    main(["read", str(trace)])
    assert "2 steps on the CPU" in capsys.readouterr().out
    main(["read", str(captured[0] / "memory.json.gz"), "--memory", str(tmp_path / "m.png")])
    assert "Memory at its peak" in capsys.readouterr().out
    assert (tmp_path / "m.png").exists()
    for command in (["read", "--compare"], ["--compare"]):
        picture = tmp_path / f"{len(command)}.png"
        main([*command, str(trace), str(trace), "--picture", str(picture)])
        assert "+0.00" in capsys.readouterr().out
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "trace"), [("--picture", "trace.json.gz"), ("--memory", "memory.json.gz")]
)
def test_a_picture_that_cannot_be_written_is_named(captured, flag, trace, tmp_path):
    path = tmp_path / "missing" / "picture.png"
    with pytest.raises(UserError, match=f"{flag} {path}: the folder .*missing does not exist"):
        main(["read", str(captured[0] / trace), flag, str(path)])
    os.mkfifo(pipe := tmp_path / "pipe.png")
    with pytest.raises(UserError, match=f"{flag} {pipe} is a pipe"):
        main(["read", str(captured[0] / trace), flag, str(pipe)])


def test_ranges_leave_nothing_behind(tmp_path):
    """A step that was traced is afterwards as if it had never been."""
    data = write_predictable(tmp_path / "data.jsonl")
    config = replace(parse(SMALL).training(), data=(str(data),))
    ranges = Ranges()
    with open_steps(config, on_phase=ranges) as (step, loader):
        with torch.profiler.profile() as profiler, ranges.named(step):
            take(step, loader, 1)
        names = {event.name for event in profiler.events()}
        phases = {"data", "forward", "backward", "accumulate", "optimizer"}
        assert phases | {"layers.0.attention", "layers.1.mlp"} <= names
        with torch.profiler.profile() as profiler:
            take(step, loader, 1)
        assert not phases & {event.name for event in profiler.events()}
        hooked = [m for m in step.model.modules() if isinstance(m, MODULES)]
        assert hooked and not any(m._forward_hooks or m._forward_pre_hooks for m in hooked)


run = partial(forked.run_module, "hamner.profile")


def test_help_and_reading_do_not_load_torch(tmp_path):
    writer = TraceWriter()
    writer.kernel("nvjet_a", 0, 5, launch=-10)
    trace = writer.write(tmp_path / "t.json")
    for args in (["--help"], ["read", str(trace)]):
        output_without(["torch"], "hamner.profile", *args)


def flags_of(command: str) -> set[str]:
    result = forked.run_module(command, "--help")
    return set(re.findall(r"(?<=[│,] )--[a-z0-9-]+", result.stdout))


def test_takes_every_flag_of_train():
    assert flags_of("hamner.train") <= flags_of("hamner.profile")
    config = parse(["--option", "b", "--recompute", "full", "--steps", "5", "--data", "a", "b"])
    assert isinstance(config, ProfileConfig)
    run = config.training()
    assert (config.task.steps, run.recompute, run.data) == (5, "full", ("a", "b"))
    assert run.steps is None


def test_the_model_is_the_one_that_training_would_start_from(tmp_path):
    shape = replace(DENSE, vocab_size=300)
    source = save_run(tmp_path / "source", build(shape, seed=5))
    data = write_predictable(tmp_path / "data.jsonl")
    args = ["--init-from", str(source), "--device", "cpu", "--batch-size", "2", "--lr", "1e-3"]
    # A run's own copy is enough.
    path = source / "config.json"
    path.write_text(path.read_text().replace('"builtin"', '"gone.json"'))
    with open_steps(parse([*args, "--data", str(data)]).training()) as (step, _):
        expected = build(shape, seed=5).state_dict()
        assert {name: weight.tolist() for name, weight in step.model.state_dict().items()} == {
            name: weight.tolist() for name, weight in expected.items()
        }
    with pytest.raises(UserError, match="--hidden-size 128 is not its 64"):
        open_steps(parse([*args, "--hidden-size", "128"]).training()).__enter__()


def test_tokens_of_conversations_are_reserved_as_in_training(tmp_path, monkeypatch):
    data, tokenizer = write_predictable(tmp_path / "data.jsonl"), foreign(tmp_path, 4)
    args = ["--data", str(data), "--tokenizer", str(tokenizer), "--vocab-size", "300"]
    opened = []

    def open_loader(config, tokenizer, pin_memory):
        opened.append(tokenizer)
        return data_of_run.open_loader(config, tokenizer, pin_memory)

    monkeypatch.setattr(steps, "open_loader", open_loader)
    for more in ([], ["--reserve-chat-tokens"]):
        with open_steps(parse([*SMALL, *args, *more]).training()):
            pass
    assert [bool(missing_chat_tokens(tokenizer)) for tokenizer in opened] == [True, False]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--option", "tiny", "--keep-every", "5", "--keep", "0"], "does nothing with --keep 0"),
        (["--init-from", "nowhere"], "--init-from nowhere is neither a run's folder nor one"),
        (["read", "missing.json"], "missing.json"),
        (["read"], "TRACE"),
        (["read", "a", "--compare", "a", "b"], "TRACE"),
        (["read", "--compare", "a", "b", "--steps", "0"], "--steps 0"),
        (["read", "--compare", "a", "b", "--memory", "m.png"], "--memory is of one TRACE"),
        (["--option", "huge"], "--option huge"),
        (["--option", "None"], "--option None is not one of"),
        (["--option", "tiny", "--warmup", "-1"], "--warmup -1"),
        (["--option", "tiny", "--tool", "nsight", "--device", "cpu"], "--tool nsight"),
        (["--option", "tiny", "--data", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(args, named, tmp_path):
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("--option", "tiny", "--out", str(tmp_path))
    assert result.returncode == 2
    assert "--out" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "open_steps", lambda *_: nullcontext((None, None)))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*file/out cannot be written: Not a directory"):
        capture(parse(SMALL).training(), tmp_path / "file" / "out", steps=1, warmup=0)
