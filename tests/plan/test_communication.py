"""Bytes, milliseconds and what shows of them, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS
from hamner.plan.communication import (
    ONE_GPU,
    Parallelism,
    all_gather_bytes,
    all_reduce_bytes,
    communicate,
    gather_updates,
)
from hamner.plan.memory import FULL, SELECTIVE, account, choose
from hamner.plan.step_time import predict

A = OPTIONS["a"].model
DDP = Parallelism("ddp", 2, 1, link_gbs=10, network_gbs=1)
FSDP = Parallelism("fsdp", 2, 1, link_gbs=10, network_gbs=1)


class Model:
    """It has 100M parameters, a tenth of them the embedding; bf16: 200 MB."""

    vocab_size, hidden_size = 10_000, 1_000

    def num_parameters(self):
        return 100_000_000


def step(parallelism, micro_batches=1, **changes):
    times = {"forward_ms": 100.0, "backward_ms": 200.0}
    return communicate(Model(), parallelism, micro_batches, **(times | changes))


def test_ring_collectives():
    assert all_reduce_bytes(800, 1) == all_gather_bytes(800, 1) == 0
    assert all_reduce_bytes(800, 2) == 800
    assert all_reduce_bytes(800, 8) == 2 * 7 * 100
    # Each of 8 GPUs has 100 of 800 bytes and passes on 7 such parts.
    assert all_gather_bytes(800, 8) == 700


def test_one_gpu_sends_nothing():
    sent = step(ONE_GPU)
    assert (sent.bytes_sent, sent.ms, sent.exposed_ms) == (0, 0, 0)


def test_ddp_on_two_gpus():
    """200 MB at 10 GB/s: 20 ms, of which the embedding's tenth comes after the backward."""
    sent = step(DDP)
    assert sent.bytes_sent == 200e6
    assert sent.ms == pytest.approx(20)
    assert sent.exposed_ms == pytest.approx(2)


def test_updates_that_fsdp_gathers_for_muon_show_wholly():
    """90M of them in bf16, half from the other GPU at 10 GB/s: 9 ms."""
    sent = gather_updates(90_000_000, FSDP)
    assert (sent.bytes_sent, sent.ms, sent.exposed_ms) == (90e6, pytest.approx(9), sent.ms)
    assert gather_updates(90_000_000, DDP).bytes_sent == 0
    assert (sent + sent).bytes_sent == 180e6


def test_ddp_longer_than_the_backward():
    # 18 ms beside 5 ms of backward, and the embedding's 2 ms.
    assert step(DDP, backward_ms=5.0).exposed_ms == pytest.approx(2 + 13)


def test_ddp_sends_fp32_sums_of_several_micro_batches_once():
    sent = step(DDP, micro_batches=4)
    assert sent.bytes_sent == 400e6
    assert sent.ms == pytest.approx(40)
    # Beside the backward of the last micro-batch only.
    assert step(DDP, micro_batches=4, backward_ms=30.0).exposed_ms == pytest.approx(4 + 6)


def test_ddp_over_nodes_is_as_fast_as_its_slowest_link():
    nodes = Parallelism("ddp", 2, 2, link_gbs=10, network_gbs=1)
    sent = step(nodes)
    assert sent.bytes_sent == 2 * 3 / 4 * 200e6
    assert sent.ms == pytest.approx(300)
    assert sent.exposed_ms == pytest.approx(30 + 270 - 200)
    single = Parallelism("ddp", 1, 2, link_gbs=0.001, network_gbs=1)
    assert step(single).ms == pytest.approx(200)


def test_fsdp_on_two_gpus():
    """Two gathers of 200 MB, a reduce-scatter of 400, half of it each: 10 ms, 10 ms and 20 ms."""
    sent = step(FSDP)
    assert sent.bytes_sent == 400e6
    assert sent.ms == pytest.approx(40)
    # Of the embedding one gather and its reduce-scatter.
    assert sent.exposed_ms == pytest.approx(3)
    # 9 ms beside 4 ms of forward, 27 ms beside 6 ms of backward.
    slow = step(FSDP, forward_ms=4.0, backward_ms=6.0)
    assert slow.exposed_ms == pytest.approx(3 + 5 + 21)


def test_fsdp_sends_with_every_micro_batch():
    one, four = step(FSDP), step(FSDP, micro_batches=4)
    assert four.bytes_sent == 4 * one.bytes_sent
    assert four.exposed_ms == pytest.approx(4 * one.exposed_ms)


def test_hybrid_shards_in_a_node_and_reduces_across():
    """Two nodes of two: both GPUs of one all-reduce their 200 MB of sums over the same 1 GB/s."""
    hybrid = Parallelism("fsdp", 2, 2, link_gbs=10, network_gbs=1)
    sent = step(hybrid)
    assert sent.bytes_sent == 400e6 + 200e6
    assert sent.ms == pytest.approx(40 + 400)
    # The embedding: a tenth of 10 ms and of 420 ms; the blocks: 9 + 378 ms beside the backward.
    assert sent.exposed_ms == pytest.approx(1 + 42 + (387 - 200))
    # Across nodes once a step: three micro-batches more show what one node's do.
    four = step(hybrid, micro_batches=4)
    assert four.bytes_sent == 4 * 400e6 + 200e6
    assert four.exposed_ms == pytest.approx(sent.exposed_ms + 3 * 3)


def test_rows_are_shared_evenly():
    assert Parallelism("ddp", 4, 2).rows_per_gpu(24) == 3
    with pytest.raises(UserError, match=r"--batch-size 24 .* their number, 16: try .* 32"):
        Parallelism("ddp", 8, 2).rows_per_gpu(24)


def memory(parallelism, micro_batches=1, policy=SELECTIVE):
    config = replace(OPTIONS["a"], batch_size=12 * micro_batches * parallelism.ranks)
    return account(config, (policy,) * 24, 12, parallelism=parallelism)


def test_memory_of_ddp_is_that_of_one_gpu_and_all_gradients_throughout():
    one, ddp = memory(ONE_GPU), memory(DDP)
    assert (ddp.weights, ddp.optimizer) == (one.weights, one.optimizer)
    assert ddp.communication == 2 * A.num_parameters()
    # At the peak, in the loss, one GPU has formed no gradient yet.
    assert ddp.total - one.total == ddp.communication
    assert sum(ddp.parts().values()) == ddp.total
    assert ddp.gradients == 0
    # At the last block the head's was formed, now in the buckets.
    one, ddp = (memory(parallelism, policy=FULL) for parallelism in (ONE_GPU, DDP))
    assert one.backward - ddp.backward == 2 * 49_152 * 1024


def test_memory_of_fsdp_is_a_shard_and_what_is_whole():
    eight = Parallelism("fsdp", 8, 1)
    one, sharded = memory(ONE_GPU, micro_batches=2), memory(eight, micro_batches=2)
    for kind in ("weights", "optimizer"):
        assert getattr(sharded, kind) == getattr(one, kind) // 8
    # A shard's gradient is fp32, and so the sum of the micro-batches' as well.
    assert (sharded.gradients, sharded.gradient_sums) == (one.gradient_sums // 8, 0)
    embedding = 49_152 * 1024
    layer = (A.num_parameters() - embedding - 1024) // 24
    # Weights and gradients, bf16, of the embedding and of two blocks.
    assert sharded.communication == 2 * 2 * (embedding + 2 * layer)
    whole = memory(replace(eight, reshard=False), micro_batches=2)
    assert whole.communication == sharded.communication + 2 * A.num_parameters()
    assert sharded.activations == one.activations
    assert sum(sharded.parts().values()) == sharded.total
    # Replicated over a second node, a GPU holds as much.
    assert memory(Parallelism("fsdp", 8, 2), micro_batches=2) == sharded


def test_shards_make_room():
    config = replace(OPTIONS["a"], batch_size=4)
    with pytest.raises(UserError, match="too small"):
        choose(config, 4 * GIB, parallelism=Parallelism("ddp", 4, 1))
    plan = choose(config, 4 * GIB, parallelism=Parallelism("fsdp", 4, 1))
    assert plan.micro_batch_size == 1


def test_a_step_on_several_gpus_is_one_gpus_share_and_what_shows():
    def predicted(batch_size, parallelism=ONE_GPU):
        config = replace(OPTIONS["a"], batch_size=batch_size)
        policies = (SELECTIVE,) * 24
        return predict(config, GPUS["rtx-3090"], policies, 12, parallelism=parallelism)

    one, both, sharded = predicted(12), predicted(24, DDP), predicted(24, FSDP)
    sent = both.communication
    assert sent.bytes_sent == 2 * A.num_parameters()
    # The embedding's 50M parameters in bf16 at 10 GB/s; the rest is hidden.
    assert sent.exposed_ms == pytest.approx(2 * 49_152 * 1024 / 10e9 * 1e3)
    # Without a CUDA graph: 6.4 us a kernel instead of 3.3.
    gaps = one.milliseconds["gaps"] * 6.4 / 3.3
    assert both.milliseconds["gaps"] == pytest.approx(gaps)
    launched = one.step_ms - one.milliseconds["gaps"] + gaps
    assert both.step_ms == pytest.approx(launched + sent.exposed_ms)
    assert both.tokens_per_second == pytest.approx(24 * 1024 / both.step_ms * 1e3)
    assert both.mfu == pytest.approx(one.mfu * one.step_ms / both.step_ms)
    assert sharded.milliseconds["optimizer"] == pytest.approx(one.milliseconds["optimizer"] / 2)
    with pytest.raises(ValueError, match="not a multiple of micro_batch_size=12 on each GPU"):
        predicted(36, DDP)
