"""A driver that only notes what it is given stands in for the GPU; the compiler is the real one."""

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from bench.as_capability import (
    MULTIPROCESSORS,
    WrongCodeError,
    as_capability,
    check_code,
    shared_memory_to_take,
)
from hamner.errors import UserError
from hamner.kernels.launch import capability
from tests.bench.stand_in_gpu import Driver, on_h200
from tests.kernels import executed
from tests.kernels.executed import Executed, configurations, report


def add_one(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1.0, mask=offs < n)


def launcher():
    """A function launches a kernel of its own with a block size; nothing is computed."""
    kernel, x = JITFunction(add_one), torch.empty(64)
    return lambda block: kernel[(1,)](x, 64, BLOCK=block)


def is_ptx(binary: str | bytes) -> bool:
    return binary.startswith(b"//") and binary.endswith(b"\0") and b".target sm_86\n" in binary


def check_kernels(driver):
    cuda, launch = torch.device("cuda"), launcher()
    launch(64)
    with as_capability("8.6") as loaded:
        assert capability(cuda) == "8.6"
        launch(64)
        launch(64)
        launch(32)
        with as_capability(None):
            assert capability(cuda) == "9.0"
            launch(32)
        launch(64)
    assert capability(cuda) == "9.0"
    launch(64)
    assert list(map(is_ptx, driver.binaries)) == [False, True, True, False]
    with as_capability("8.6"):
        launch(64)
    assert len(driver.binaries) == 4, "what was compiled is kept"
    assert [kernel.constexprs for kernel in loaded] == [{"BLOCK": 64}, {"BLOCK": 32}]
    assert {(kernel.name, kernel.capability, kernel.num_warps) for kernel in loaded} == {
        ("add_one", "8.6", 4)
    }


def test_kernels_are_those_of_the_older_gpu():
    on_h200(check_kernels)


def check_shared_memory(driver):
    launch = launcher()
    for name, fits in (("8.6", False), (None, True)):
        with as_capability(name):
            kernel = launch(64)
            kernel.module, kernel.metadata = None, kernel.metadata._replace(shared=101_377)
            if fits:
                kernel._init_handles()
            else:
                with pytest.raises(OutOfResources, match=r"Required: 101377.* limit: 101376"):
                    kernel._init_handles()


def test_shared_memory_is_that_of_the_older_gpu():
    on_h200(check_shared_memory)


def check_occupancy(driver):
    launch = launcher()
    for name, wanted in (("8.6", 115_713), (None, 65_536)):
        with as_capability(name) as loaded:
            kernel = launch(64)
            kernel.module, kernel.metadata = None, kernel.metadata._replace(shared=65_536)
            kernel._init_handles()
            assert driver.shared[-1] == wanted
            assert wanted in kernel.packed_metadata or name is None
            assert kernel.metadata.shared == loaded[-1].shared == 65_536


def test_no_more_blocks_share_a_multiprocessor():
    on_h200(check_occupancy)


@pytest.mark.parametrize(
    ("shared", "threads", "blocks"),
    [(0, 128, None), (4096, 128, None), (49_152, 128, 2), (49_152, 512, 2), (50_176, 128, 2)]
    + [(50_177, 128, 1), (101_376, 256, 1), (16_384, 512, None), (16_384, 128, 5)],
)
def test_shared_memory_of_a_block(shared, threads, blocks):
    """None: threads or the number of blocks, not shared memory, limit those of an RTX 3090."""
    taken = shared_memory_to_take(MULTIPROCESSORS["8.6"], shared, threads, own=233_472)
    if blocks is None:
        assert taken == shared
    else:
        assert (102_400 // (shared + 1024), 233_472 // (taken + 1024)) == (blocks, blocks)


@pytest.mark.parametrize(
    ("ptx", "found"),
    [
        (".version 8.7\n.target sm_90a\n", "for sm_90a"),
        (".version 8.7\n.target sm_80\n", "for sm_80"),
        ("", "without a target"),
        (".target sm_86\nwgmma.mma_async.sync", "wgmma"),
    ],
)
def test_other_code_is_refused(ptx, found):
    with pytest.raises(WrongCodeError, match=f"^name .*{found}"):
        check_code("name", ptx, "8.6")
    check_code("name", ".version 8.7\n.target sm_86\nmma.sync", "8.6")


@pytest.mark.parametrize(
    ("own", "asked"), [((8, 0), "8.6"), ((9, 0), "7.5"), ((10, 0), "9.0"), ((9, 0), "x")]
)
def test_code_that_the_gpu_cannot_run_is_refused(monkeypatch, own, asked):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: own)
    message = rf"^--as-capability {asked}: a GPU of capability {own[0]}.{own[1]} can run as"
    with pytest.raises(UserError, match=message), as_capability(asked):
        pass


def check_report(driver):
    launch = launcher()
    with as_capability("8.6") as loaded:
        launch(64)
        launch(128)
    kernels = Executed(loaded)
    tests = [("first", kernels.since_last_call()), ("second", kernels.since_last_call())]
    wanted = {f"add_one: BLOCK={block}, 4 warps, 3 stages" for block in (64, 256)}
    with mock.patch.object(executed, "configurations", lambda capability: wanted):
        lines, missing = report("8.6", tests)
    assert lines == [
        "add_one: BLOCK=64, 4 warps, 3 stages; 32 registers, 0 spilled, 0 bytes shared; first"
    ]
    assert missing == ["add_one: BLOCK=256, 4 warps, 3 stages"]


def test_report_names_what_was_not_executed():
    on_h200(check_report)


def test_configurations_are_rows_of_the_launch_tables():
    rows = {name: configurations(name) for name in ("8.6", "9.0")}
    assert "gate_up: BLOCK_K=32, BLOCK_M=128, BLOCK_N=64, 4 warps, 4 stages" in rows["8.6"]
    assert any("128 registers at most" in row for row in rows["9.0"] - rows["8.6"])
