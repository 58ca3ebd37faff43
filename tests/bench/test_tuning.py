"""What is timed is made up here; what is compiled, installed and printed is not."""

import functools
import gc
import importlib
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from bench import tune, tune_flash_attention, tuning
from bench.as_capability import as_capability
from bench.ceilings import Ceilings
from bench.mma_matmul import MatmulTile, matmul
from bench.tuning import Subject, Timed, Worker, described, rank, summarize, table
from hamner.plan.costs import Cost
from tests.bench.stand_in_gpu import Driver, on_h200


class Times:
    """A configuration takes the microseconds that a table says, and each round a little more."""

    def __init__(self, microseconds):
        self.microseconds, self.installed = microseconds, None

    def install(self, values):
        self.installed = values
        return nullcontext()

    def __call__(self, calls):
        self.called, values, rounds = len(calls), self.installed, iter(range(99))
        return type(
            "", (), {"milliseconds": lambda _: (self.microseconds[values] + next(rounds)) / 1e3}
        )()


def subject(times: Times) -> Subject:
    return Subject(
        name="op forward",
        candidates=[(i,) for i in range(1, 8)],
        current=(3,),
        build=list,
        install=times.install,
        cost=Cost(flops=6e6),
    )


@pytest.fixture
def times(monkeypatch) -> Times:
    times = Times({(i,): 1000 - 100 * i for i in range(1, 9)})
    monkeypatch.setattr(tuning, "ManyCalls", times)
    return times


def test_rows_are_ranked_among_those_that_fit(times, capsys):
    misfits = {("op forward", (7,)): "spills 8 bytes a thread", ("another", (6,)): "too large"}
    ranking = rank(subject(times), misfits)
    assert times.called == tuning.COPIES
    # The table's own is timed again with the best ones. In each round a call takes 1 us more.
    assert [one.values for one in ranking.finalists] == [(6,), (5,), (4,), (3,)]
    assert ranking.best == Timed((6,), 402, 4 / 402)
    assert ranking.ours.values == (3,)
    assert set(ranking.once) == {(i,) for i in range(1, 7)}
    assert ranking.misfits == {(7,): "spills 8 bytes a thread"}
    assert capsys.readouterr().out.splitlines()[0] == "op forward:    402.0 us  (6,)"


def test_short_table(times):
    plain = rank(replace(subject(times), current=None, name=tuning.MATMUL_NAME), {})
    in_memory = replace(subject(times), cost=Cost(bytes=7e5))
    rankings = [plain, rank(subject(times), {}), rank(in_memory, {})]
    lines = table(rankings, Ceilings(copy_gb_per_s=2.0, matmul_tflop_per_s=99.0))
    assert [" ".join(line.split()) for line in lines[2:4]] == [
        "op forward 702.0 302.0 132.5% 1.3% 0 TFLOP/s 43% best: (7,)",
        "op forward 702.0 302.0 132.5% 1.3% 1 GB/s 50% best: (7,)",
    ]
    assert "best" not in lines[1]
    assert json.loads(json.dumps(described(rankings[1])))["table"] == [3]


def test_a_summary_is_the_median_and_the_range():
    assert summarize((1,), [10.0, 12.0, 11.0]) == Timed((1,), 11.0, 2 / 11)


def test_nothing_fits(times):
    misfits = {("op forward", (i,)): "too large" for i in range(1, 8)}
    with pytest.raises(tuning.UserError, match="no configuration of op forward fits"):
        rank(subject(times), misfits)


def heavy(x_ptr, BLOCK: tl.constexpr):
    """A thread holds BLOCK / 16 values at once."""
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(x_ptr + 2 * offs)
    tl.debug_barrier()
    tl.store(x_ptr + offs, x * y)


def check_worker(driver):
    kernel, x, times = JITFunction(heavy), torch.empty(64), Times({})

    def build():
        return lambda: kernel[(1,)](x, BLOCK=times.installed[0], num_warps=1, maxnreg=32)

    Worker.subjects = {"op forward": replace(subject(times), build=build)}
    with as_capability("8.6") as Worker.loaded:
        assert Worker.compile(("op forward", (64,))) is None
        assert "spills" in Worker.compile(("op forward", (1024,)))


def test_workers_say_what_does_not_fit():
    on_h200(check_worker)


def check_start(driver):
    Worker.start("8.6", list)
    gc.collect()
    assert torch.cuda.get_device_capability() == (8, 6)


def test_workers_stay_the_older_gpu():
    on_h200(check_start)


SUBJECTS = {
    "tune": functools.partial(tune.subjects, tuple(tune.KERNELS)),
    "64, 64": functools.partial(tune_flash_attention.subjects, (64, 64, 1024)),
    "64, 128": functools.partial(tune_flash_attention.subjects, (64, 128, 1024)),
}


@pytest.mark.parametrize("row", ["8.6", "9.0"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_configuration_goes_into_the_table_and_out_again(name, row, monkeypatch):
    capability = tuple(map(int, row.split(".")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    tables = [
        importlib.import_module(f"hamner.kernels.{module}").CONFIGS for module in tune.KERNELS
    ]
    tables.append(tune_flash_attention.CONFIGS)
    before = [dict(table) for table in tables]
    _, *subjects = SUBJECTS[name]()
    for one in subjects:
        with one.install(one.current):
            assert tables == before, one.name
        for values in one.candidates:
            with one.install(values):
                assert tables != before or values == one.current
            assert tables == before
        assert one.cost.flops or one.cost.bytes


@pytest.mark.parametrize("main", [tune.main, tune_flash_attention.main])
@pytest.mark.parametrize(
    ("flags", "on_gpu", "message"),
    [
        ([], False, "no CUDA GPU found; launch tables are measured on the GPU they are for"),
        (
            ["--output", "/nowhere/x"],
            True,
            "--output /nowhere/x: the folder /nowhere does not exist",
        ),
        (["--output", "/"], True, "--output / is a folder; name a file in it"),
        (["--as-capability", "7.5"], True, "--as-capability 7.5: a GPU of capability 9.0 can run"),
    ],
)
def test_bad_flags(main, flags, on_gpu, message, monkeypatch, capsys):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    with pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("main", [tune.main, tune_flash_attention.main])
def test_where_nothing_fits_the_command_ends_with_a_sentence(main, monkeypatch, capsys):
    def rank(*_):
        raise tuning.UserError("no configuration of rope packed fits this GPU")

    module = tune if main is tune.main else tune_flash_attention
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    for owner, name, value in (
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "is_available", lambda: True),
        (tuning, "use_recordable_stream", lambda: None),
        (module, "compile_ahead", lambda *_: {}),
        (module, "rank", rank),
    ):
        monkeypatch.setattr(owner, name, value)
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "error: no configuration of rope packed fits this GPU" in capsys.readouterr().err


def test_the_table_is_printed_where_the_disk_does_not_take_the_times(
    times, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(tuning, "measure", lambda: Ceilings(2.0, 99.0))
    monkeypatch.setattr(tuning, "conditions", dict)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    plain = rank(replace(subject(times), name=tuning.MATMUL_NAME), {})
    (tmp_path / "times.json").mkdir()
    with pytest.raises(tuning.UserError, match=r"^--output .*times\.json cannot be written: "):
        tuning.conclude([plain], "9.0", tmp_path / "times.json")
    assert "# H200, row 9.0" in capsys.readouterr().out


def test_plain_matmul(device):
    a, b = torch.randn(64, 96, device=device), torch.randn(96, 128, device=device)
    torch.testing.assert_close(matmul(a, b, MatmulTile(32, 32, 32, 4, 2)), a @ b)
    with pytest.raises(ValueError, match="not in whole tiles"):
        matmul(a, b, MatmulTile(64, 64, 64, 4, 2))
