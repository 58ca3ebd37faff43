"""A driver that only notes what it is given stands in for the GPU; the compiler is the real one."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from bench.as_capability import WrongCodeError, as_capability, check_code
from hamner.errors import UserError
from hamner.kernels.launch import capability
from tests.kernels import executed
from tests.kernels.executed import Executed, configurations, report


def add_one(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1.0, mask=offs < n)


class Driver:
    """The driver of an H200 takes kernels and does nothing."""

    def __init__(self):
        self.binaries = []
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            unload_module=lambda module: None,
        )

    def load_binary(self, name, binary, shared, device):
        self.binaries.append(binary)
        return len(self.binaries), 1, 32, 0, 1024

    def launcher_cls(self, src, metadata):
        return lambda *arguments: None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return driver


@pytest.fixture
def launch():
    """Launch a kernel with a block size; nothing is computed."""
    kernel, x = JITFunction(add_one), torch.empty(64)

    def launch(block: int):
        return kernel[(1,)](x, 64, BLOCK=block)

    return launch


def is_ptx(binary: str | bytes) -> bool:
    return binary.startswith(b"//") and binary.endswith(b"\0") and b".target sm_86\n" in binary


def test_kernels_are_those_of_the_older_gpu(driver, launch):
    cuda = torch.device("cuda")
    launch(64)
    with as_capability("8.6") as loaded:
        before = len(loaded)
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
    assert [is_ptx(binary) for binary in driver.binaries] == [False, True, True, False]
    with as_capability("8.6"):
        launch(64)
    assert len(driver.binaries) == 4, "what was compiled is kept"
    new = loaded[before:]
    assert [kernel.constexprs for kernel in new] == [{"BLOCK": 64}, {"BLOCK": 32}]
    assert {(kernel.name, kernel.capability, kernel.num_warps) for kernel in new} == {
        ("add_one", "8.6", 4)
    }


def test_shared_memory_is_that_of_the_older_gpu(driver, launch):
    kernel = launch(64)
    metadata = kernel.metadata._replace(shared=101_377)
    for name, fits in (("8.6", False), (None, True)):
        with as_capability(name):
            other = launch(16 if fits else 8)
            other.module, other.metadata = None, metadata
            if fits:
                other._init_handles()
            else:
                with pytest.raises(OutOfResources, match=r"Required: 101377.* limit: 101376"):
                    other._init_handles()


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
def test_code_that_the_gpu_cannot_run_is_refused(driver, monkeypatch, own, asked):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: own)
    message = rf"^--as-capability {asked}: a GPU of capability {own[0]}.{own[1]} can run as"
    with pytest.raises(UserError, match=message), as_capability(asked):
        pass


def test_report_names_what_was_not_executed(driver, launch, monkeypatch):
    with as_capability("8.6") as loaded:
        before = len(loaded)
        launch(64)
        launch(128)
    kernels = Executed(loaded[before:])
    wanted = {f"add_one: BLOCK={block}, 4 warps, 3 stages" for block in (64, 256)}
    monkeypatch.setattr(executed, "configurations", lambda capability: wanted)
    tests = [("first", kernels.since_last_call()), ("second", kernels.since_last_call())]
    lines, missing = report("8.6", tests)
    assert lines == [
        "add_one: BLOCK=64, 4 warps, 3 stages; 32 registers, 0 spilled, 0 bytes shared; first"
    ]
    assert missing == ["add_one: BLOCK=256, 4 warps, 3 stages"]


def test_configurations_are_rows_of_the_launch_tables():
    rows = {name: configurations(name) for name in ("8.6", "9.0")}
    assert "gate_up: BLOCK_K=32, BLOCK_M=128, BLOCK_N=64, 4 warps, 4 stages" in rows["8.6"]
    assert any("128 registers at most" in row for row in rows["9.0"] - rows["8.6"])
