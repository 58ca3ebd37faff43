"""Engines and plans decide this without other processes."""

import gc
import json
import os
import subprocess
import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hamner.config.options import OPTIONS, for_option
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.hardware import GIB
from hamner.model.attention import AttentionBackend, sdpa
from hamner.model.transformer import Transformer
from hamner.parallel import device, engines, failures
from hamner.parallel.engines import DataParallel, Engine, FullySharded
from hamner.parallel.failures import FailureWatch
from hamner.parallel.processes import SingleProcess
from hamner.parallel.ranks import Rank
from hamner.train import setup
from hamner.train.__main__ import parse
from hamner.train.optimizer import Optimizer
from hamner.train.step import TrainStep
from tests.models import DENSE, plain_ops
from tests.models import build as build_model
from tests.stops import run_with_a_stop, stop

FOUR = Rank(global_rank=1, world_size=4, local_rank=1, local_world_size=4)


def plan(config: TrainConfig, rank: Rank, budget: float):
    compute = device.select(replace(config, device="cpu"))
    return setup.plan_parallel(config, compute, int(budget * GIB), rank)


def test_auto_is_ddp_where_the_model_fits_and_fsdp_where_it_does_not():
    config = for_option("a")
    whole = 16 * config.model.num_parameters() / GIB
    kind, memory = plan(config, FOUR, 100.0)
    assert (kind, memory.micro_batch_size) == ("ddp", 1)  # a CPU gains nothing from more
    assert memory.account.total > whole * GIB
    kind, memory = plan(config, FOUR, whole)
    assert kind == "fsdp"
    assert memory.account.total < whole * GIB
    with pytest.raises(UserError, match="--vram-budget"):
        plan(replace(config, parallel="ddp"), FOUR, whole)
    assert plan(replace(config, parallel="fsdp"), FOUR, 100.0)[0] == "fsdp"
    assert plan(config, Rank(), 100.0)[0] == "none"


def test_a_step_must_be_dealt_evenly():
    config = for_option("a")
    with pytest.raises(UserError, match=r"--micro-batch-size 4 .* the 6 sequences .* 4 processes"):
        plan(replace(config, micro_batch_size=4), FOUR, 100.0)
    with pytest.raises(UserError, match="--batch-size 10 is shared .* multiple of their number, 4"):
        plan(replace(config, batch_size=10), FOUR, 100.0)
    assert plan(replace(config, micro_batch_size=3), FOUR, 100.0)[1].micro_batch_size == 3


def test_weights_that_stay_gathered_are_counted():
    config = replace(for_option("a"), parallel="fsdp")
    freed, kept = (
        plan(replace(config, fsdp_reshard=reshard), FOUR, 100.0)[1].account
        for reshard in (True, False)
    )
    assert kept.total - freed.total == 4 * config.model.num_parameters()


def test_micro_batches_are_dealt_in_order():
    class Third(SingleProcess):
        rank = Rank(global_rank=2, world_size=4)

    assert Third().share(range(0, 24, 3)) == range(12, 18, 3)


def test_rank_is_read_from_the_environment_of_torchrun():
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    rank = Rank.read(variables)
    assert rank == Rank(global_rank=3, world_size=4, local_rank=1, local_world_size=2)
    assert rank.num_machines == 2
    assert not rank.is_main
    assert Rank.read({"WORLD_SIZE": "4"}) == Rank()  # other launchers set only that one


def test_without_the_launcher_each_machine_says_why_the_job_ends():
    store = dist.HashStore()
    processes = [
        Rank(global_rank=number, world_size=4, local_rank=number % 2, local_world_size=2)
        for number in range(4)
    ]
    watches = [FailureWatch(store, rank) for rank in processes]
    assert [watch.claim() for watch in watches] == [True, False, False, False]

    class Gone:
        def add(self, *_):
            raise RuntimeError("Connection reset by peer")

    for watch in watches:
        watch.store = Gone()
    assert [watch.claim() for watch in watches] == [True, False, True, False]


def test_a_process_that_this_one_cannot_see_is_dead_only_once_it_is_silent():
    """Containers of one machine may share its name, but not the numbers of their processes."""
    process = subprocess.Popen(["true"])
    process.wait()
    sign = {"system": failures._system(), "pid": process.pid}
    assert failures._is_dead(sign, silent=1.0)
    assert not failures._is_dead({**sign, "pid": os.getpid()}, silent=1.0)
    sign["system"] += " of another container"
    assert not failures._is_dead(sign, silent=1.0)
    assert failures._is_dead(sign, silent=failures.SILENT + 1.0)


def watch_another_machine() -> None:
    failures.INTERVAL, failures.SILENT = 0.05, 1.0
    store = dist.HashStore()
    sign = {"beats": 1, "system": "another machine", "host": "there", "leaves": False}
    store.set("1", json.dumps(sign))
    watch = FailureWatch(store, Rank(world_size=2, local_world_size=1))
    watch.watch()
    time.sleep(0.2)
    stop()
    looks = watch._beats + 3
    while watch._beats < looks:
        time.sleep(0.01)
    watch.close()


def test_time_in_which_all_processes_are_stopped_is_no_silence():
    """Another machine gives its next sign a moment after this one goes on."""
    assert run_with_a_stop(watch_another_machine) == 0


def test_a_repeated_command_resumes(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args = ["--option=tiny", "--run_dir", str(run), "--steps", "9", "--lr", "1e-3"]
    started = parse(args)
    assert not started.resume
    run.mkdir()
    (run / "config.json").write_text(json.dumps(started.to_json()))
    assert parse(args) == replace(started, resume=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not parse(args).resume


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_ddp_sends_gradients_once_a_step_in_fp32_where_they_add_up(
    micro_batches, group, monkeypatch
):
    sent = []
    real = engines._sum
    monkeypatch.setattr(engines, "_sum", lambda tensor: sent.append(tensor.dtype) or real(tensor))
    model = build_model(DENSE)
    optimizer = Optimizer(model, plain_ops(), OPTIONS["tiny"], dtype=torch.bfloat16)
    engine = DataParallel(SingleProcess(), bucket_mib=1)
    forward = engine.wrap(model, optimizer)
    inputs = torch.randint(DENSE.vocab_size, (micro_batches, 1, 17))
    expected = {}
    for number, tokens in enumerate(inputs):
        is_last = number == micro_batches - 1
        grads = torch.autograd.grad(
            model(tokens[:, :-1], tokens[:, 1:]).loss, list(optimizer.parameters.values())
        )
        for name, grad in zip(optimizer.parameters, grads, strict=True):
            expected[name] = expected.get(name, 0) + grad.float()
        before = len(sent)
        with engine.micro_batch(is_last=is_last):
            engine.backward(forward(tokens[:, :-1], tokens[:, 1:]).loss)
        assert (len(sent) > before) == is_last
        if micro_batches > 1:
            engine.accumulate(optimizer, is_last=is_last)
    gradients = optimizer.accumulated or {n: p.grad for n, p in optimizer.parameters.items()}
    for name, gradient in gradients.items():
        assert torch.equal(gradient.float(), expected[name]), name
    if micro_batches > 1:
        assert set(sent) == {torch.float32}
        assert all(parameter.grad is None for parameter in optimizer.parameters.values())


def test_with_several_processes_a_graph_holds_the_only_micro_batch_of_a_step(group):
    compute = device.select(replace(for_option("tiny"), device="cpu"))
    sharded = FullySharded(SingleProcess(), compute, reshard=True)
    assert not DataParallel(SingleProcess(), bucket_mib=1).records_parts
    assert not sharded.records_parts
    assert Engine().records_parts


def test_the_garbage_collector_finds_a_model_that_ddp_has_wrapped(group):
    """The hook that DDP holds must not hold DDP: a bench builds one trainer after another."""
    model = build_model(DENSE)
    optimizer = Optimizer(model, plain_ops(), OPTIONS["tiny"], dtype=torch.float32)
    engine = DataParallel(SingleProcess(), bucket_mib=1)
    forward = engine.wrap(model, optimizer)
    found = weakref.ref(forward)
    del model, optimizer, engine, forward
    gc.collect()
    assert found() is None


def test_passes_without_gradients_leave_nothing_behind(group):
    """A replayed backward pass never clears what FSDP2 remembers of forward passes."""
    config = replace(for_option("tiny"), device="cpu")
    engine = FullySharded(SingleProcess(), device.select(config), reshard=True)
    with torch.device("meta"):
        model = Transformer(DENSE, plain_ops())
    engine.shard(model)
    model.to_empty(device="cpu")
    model.initialize(0)
    with engine.inference(model), torch.no_grad():
        for _ in range(3):
            model(torch.randint(DENSE.vocab_size, (1, 16)))
    for module in (*model.layers, model):
        state = module._get_fsdp_state()
        assert not state._comm_ctx.post_forward_order
        assert not state._fsdp_param_group._post_forward_indices


def following(*answers) -> SingleProcess:
    """The process is of another rank, to which rank 0 says `answers` one after another."""
    processes, answers = SingleProcess(), iter(answers)
    processes.from_main = lambda function: next(answers)
    return processes


def test_other_ranks_follow_rank_0():
    config = replace(for_option("tiny"), device="cpu")
    plan = replace(TrainStep(config).plan, micro_batch_size=2)
    choice = AttentionBackend("sdpa", sdpa, sdpa, "timed by rank 0")
    followed = TrainStep(config, following(("none", plan, choice), True))
    assert followed.plan == plan
    assert followed.attention == choice
    assert followed.records_graph
    choice = choice._replace(name="flash-attn")
    with pytest.raises(UserError, match="--attention flash-attn: it needs a CUDA GPU"):
        TrainStep(config, following(("none", plan, choice), True))
