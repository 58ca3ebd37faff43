"""Whatever fails beside training, the run ends with its last step saved and the right exit code.

The rows of docs/surviving.md, each by a fault that is put in.
"""

import contextlib
import errno
import io
import os
import pwd
import signal
import stat
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hamner import files
from hamner.checkpoint import format as checkpoint
from hamner.config.train import TrainConfig
from hamner.data import validation
from hamner.errors import EXIT_INTERRUPTED, UserError
from hamner.model import generate
from hamner.train import __main__ as command
from hamner.train import evaluation, log, loop, pictures
from hamner.train.beside import Beside
from hamner.train.loop import TrainingLoop, train
from tests.train.test_loop import assert_equal_weights, metrics, small_config

STEPS = 4


@pytest.fixture
def config(tmp_path, monkeypatch) -> TrainConfig:
    """A run of seconds that does all there is to do beside training."""
    config = small_config(tmp_path)
    return replace(
        config,
        model=replace(config.model, num_layers=1, expert_intermediate_size=64),
        steps=STEPS,
        batch_size=4,
        seq_len=32,
        log_every=1,
        eval_every=2,
        save_every=2,
        sample_every=2,
        eval_tokens=256,
    )


def run_command(config: TrainConfig, monkeypatch) -> int:
    """The exit code of `python -m hamner.train` with these flags."""
    monkeypatch.setattr(command, "parse", lambda args: config)
    return command.main([])


def saved_steps(config: TrainConfig) -> list[int]:
    found = checkpoint.find(config.run_dir / "checkpoints")
    for saved in found:
        saved.verify()
    return [saved.step for saved in found]


def fail(error: BaseException) -> Callable:
    """A function that raises."""

    def failing(*_, **__):
        raise error

    return failing


class Service:
    """A module with wandb's interface, which fails in one of its functions."""

    def __init__(self, where: str, error: BaseException) -> None:
        for name in ("init", "log", "finish"):
            setattr(self, name, fail(error) if name == where else lambda *_, **__: None)


def track(monkeypatch, config: TrainConfig, where: str, error: BaseException) -> TrainConfig:
    monkeypatch.setitem(sys.modules, "wandb", Service(where, error))
    monkeypatch.setattr(loop, "require_installed", lambda names: None)
    return replace(config, report_to=("wandb",))


def tracker_init(monkeypatch, config):
    return track(monkeypatch, config, "init", ConnectionError("no route"))


def tracker_log(monkeypatch, config):
    return track(monkeypatch, config, "log", ConnectionError("no route"))


def tracker_exit(monkeypatch, config):
    return track(monkeypatch, config, "log", SystemExit(1))


def tracker_finish(monkeypatch, config):
    return track(monkeypatch, config, "finish", ConnectionError("no route"))


def spelling(monkeypatch, config):
    monkeypatch.setattr(evaluation, "generate", fail(UserError("it cannot encode")))


def panic(monkeypatch, config):
    class PanicException(BaseException):
        """As a library in Rust has it."""

    monkeypatch.setattr(evaluation, "generate", fail(PanicException("a regex gave up")))


def evaluation_memory(monkeypatch, config):
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(evaluation, "_mean_loss", fail(error))


def plot(monkeypatch, config):
    monkeypatch.setattr(pictures, "COMMAND", ("false",))


def plot_start(monkeypatch, config):
    monkeypatch.setattr(pictures, "COMMAND", ("/nowhere/python",))


def plan_check(monkeypatch, config):
    monkeypatch.setattr(log, "PLAN_CHECK_STEP", 1)
    monkeypatch.setattr(log.TrainLog, "_compare_with_plan", fail(ZeroDivisionError("no peak")))


def folder_flush(monkeypatch, config):
    refuse_flush(monkeypatch, errno.EINVAL)


def refuse_flush(monkeypatch, number: int) -> None:
    """Folders cannot be put on disk, by this error."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    files._warn_of_flush.cache_clear()
    monkeypatch.setattr(os, "fsync", fsync)


def validation_rows(monkeypatch, config):
    monkeypatch.setattr(validation, "write_whole", fail(OSError(errno.ENOSPC, "no space")))


def retention(monkeypatch, config):
    error = PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(checkpoint, "retain", fail(error))


def stacks(monkeypatch, config):
    (config.run_dir / "stacks.txt").mkdir(parents=True)


def records(monkeypatch, config):
    (config.run_dir / "samples.jsonl").mkdir(parents=True)


def home(monkeypatch, config):
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", fail(KeyError("uid not found")))
    with pytest.raises(RuntimeError):
        Path.home()


NOT_ONCE = {records: "samples.jsonl cannot be written"}
"""warned of as often as a record has to wait, with how many"""
FAULTS = {
    tracker_init: "--report-to wandb failed: no route",
    tracker_log: "Tracker failed: no route",
    tracker_exit: "Tracker failed: 1",
    tracker_finish: "closing Tracker failed: no route",
    spelling: "sampling failed: it cannot encode",
    panic: "sampling failed: a regex gave up",
    evaluation_memory: "the evaluation failed: CUDA out of memory",
    plot: "drawing the plots failed: it ended with code 1",
    plot_start: "drawing the plots failed: No such file or directory",
    plan_check: "the comparison with the plan failed: no peak",
    folder_flush: "cannot flush folders (Invalid argument)",
    validation_rows: "validation.safetensors could not be written (no space)",
    retention: "old checkpoints stay in",
    stacks: "",
    home: "",
    **NOT_ONCE,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_beside_training_is_said_once_and_ends_nothing(
    config, monkeypatch, capsys, caplog, fault
):
    changed = fault(monkeypatch, config) or config
    assert run_command(changed, monkeypatch) == 0
    assert saved_steps(config)[-2:] == [2, STEPS]
    assert [record["step"] for record in metrics(config.run_dir)] == [1, 2, 3, 4]
    said = capsys.readouterr().out + caplog.text
    if FAULTS[fault] and fault not in NOT_ONCE:
        assert said.count(FAULTS[fault]) == 1
    assert FAULTS[fault] in said


def no_reader() -> io.TextIOBase:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


def full_disk() -> io.TextIOBase:
    return Path("/dev/full").open("w", buffering=1)


def standing_still() -> io.TextIOBase:
    """Whoever writes there waits: the pipe is full."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, bytes(4096)):
            pass
    os.set_blocking(write, True)
    stream = os.fdopen(write, "w", buffering=1)
    weakref.finalize(stream, os.close, read)
    return stream


TERMINALS = {
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    "full disk": full_disk,
    "no reader": no_reader,
    "standing still": standing_still,
    "closed": lambda: None,
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_terminal_that_refuses_ends_nothing(config, monkeypatch, terminal):
    """Its buffers are empty at the end, or the process would stumble over them."""
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: "naïve 日本")
    monkeypatch.setattr("hamner.cli.PATIENCE_SECONDS", 0.0)
    stream = TERMINALS[terminal]()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert run_command(config, monkeypatch) == 0
    assert saved_steps(config)[-1] == STEPS
    if terminal == "ascii":
        assert "na?ve ??" in stream.buffer.getvalue().decode()
    elif stream is not None:
        stream.close()


def test_a_disk_that_fails_is_no_detail(config, monkeypatch, capsys):
    """EIO means that what was written may be gone: such a checkpoint does not count."""
    refuse_flush(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match=r"could not be written \(Input/output error\); mend that"):
        run_command(config, monkeypatch)
    assert saved_steps(config) == []
    assert "step 2 could not be saved (Input/output error)" in capsys.readouterr().out


def test_a_failure_is_said_once_and_ctrl_c_goes_through():
    said = []
    beside = Beside(said.append)
    for _ in range(3):
        with beside("the service"):
            raise ValueError("two\nlines")
    with pytest.raises(KeyboardInterrupt), beside("the service"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="bug"), beside("the tokenizer", UserError):
        raise ValueError("bug")
    assert said == ["WARNING: the service failed: two lines; training goes on"]


def interrupt_in_evaluation(step: int) -> Callable[[str, int], None]:
    """The observer sends SIGTERM when the evaluation after a step begins."""

    def on_phase(phase: str, at: int) -> None:
        if (phase, at) == ("evaluation", step):
            signal.raise_signal(signal.SIGTERM)

    return on_phase


@pytest.mark.parametrize(("step", "eval_every"), [(2, 2), (STEPS, 3)])
def test_an_interrupt_abandons_an_evaluation_which_is_made_up_for(
    config, monkeypatch, step, eval_every
):
    """The records and weights are then those of a run that was not interrupted."""
    config = replace(config, sample_every=0, eval_every=eval_every)
    whole = train(replace(config, run_dir=config.run_dir.with_name("whole")))
    monkeypatch.setattr(command, "parse", lambda args: config)
    assert command.main([], on_phase=interrupt_in_evaluation(step)) == EXIT_INTERRUPTED
    assert saved_steps(config)[-1] == step
    assert metrics(config.run_dir)[-1]["val_step"] != step
    resumed = train(replace(config, resume=True))
    assert resumed == replace(whole, checkpoint=resumed.checkpoint)
    assert_equal_weights(whole, resumed)
    ours, theirs = metrics(config.run_dir), metrics(config.run_dir.with_name("whole"))
    if step == STEPS:
        assert ours == theirs
    assert ours[-1] == theirs[-1]
    assert checkpoint.find(config.run_dir / "checkpoints")[-1].state()["val_step"] == STEPS
    assert train(replace(config, resume=True)) == resumed


def test_an_interrupt_abandons_sampling(config, monkeypatch, capsys):
    tokens = []
    real = generate.choose

    def choose(*args):
        tokens.append(args)
        if len(tokens) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(generate, "choose", choose)
    assert run_command(config, monkeypatch) == EXIT_INTERRUPTED
    assert len(tokens) == 3
    assert saved_steps(config) == [2]
    assert not (config.run_dir / "samples.jsonl").exists()
    assert "--resume" in capsys.readouterr().out


def passes_of(config: TrainConfig, budget: int | None = None, fail_above: int = 10**9):
    """The rows of each pass of an evaluation, and its loss."""
    made = TrainingLoop(config)
    try:
        if budget is not None:
            made.step.compute = replace(made.step.compute, budget_bytes=budget)
        forward, rows = made.step.model.forward, []

        def watched(inputs, *args):
            if len(inputs) > fail_above:
                raise torch.OutOfMemoryError("CUDA out of memory")
            rows.append(len(inputs))
            return forward(inputs, *args)

        made.step.model.forward = watched
        return rows, evaluation.validation_loss(made.step, made.data.validation)
    finally:
        made.close()


def test_an_evaluation_takes_what_fits_not_the_micro_batch(config):
    configs = [
        replace(config, micro_batch_size=size, run_dir=config.run_dir.with_name(str(size)))
        for size in (1, 4)
    ]
    (rows, loss), (other_rows, other_loss) = map(passes_of, configs)
    assert rows == other_rows == [8]
    assert loss == other_loss
    small = replace(config, run_dir=config.run_dir.with_name("small"))
    rows, small_loss = passes_of(small, budget=0)
    assert rows == [1] * 8
    assert small_loss == pytest.approx(loss, rel=1e-6)
    short = replace(config, run_dir=config.run_dir.with_name("short"))
    rows, short_loss = passes_of(short, fail_above=3)
    assert rows == [2] * 4
    assert short_loss == pytest.approx(loss, rel=1e-6)


def test_a_graph_leaves_an_evaluation_what_it_has_not_reserved(config):
    made = SimpleNamespace(total=2**30, weights=1, optimizer=1, gradients=1, gradient_sums=0)
    compute = SimpleNamespace(
        budget_bytes=2**30 + 2**24,
        max_micro_batch_tokens=None,
        device=torch.device("cuda"),
        precision="bf16",
        kernels="triton",
    )
    step = SimpleNamespace(
        compute=compute, plan=SimpleNamespace(account=made), config=config, is_graphed=True
    )
    step.processes = SimpleNamespace(all_reduce_min=lambda number: number)
    assert evaluation.tokens_per_pass(step) < evaluation.MAX_TOKENS
    step.is_graphed = False
    assert evaluation.tokens_per_pass(step) == evaluation.MAX_TOKENS
