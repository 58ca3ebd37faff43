"""A run that an earlier version of the trainer saved goes on as it would have there.

earlier_run/ holds what commit dd190f1, the last one before the layout of today, left behind on a
CPU in fp32: `documents.jsonl`, the run folder after 8 of 14 steps of a 10,384-parameter mixture of
experts with two micro-batches a step, and in `expected.json` the metrics of the steps that the same
commit trained when it resumed that folder.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests import forked

pytestmark = pytest.mark.xdist_group("an earlier run")
EARLIER = Path(__file__).parent / "earlier_run"
TRAINED = ("loss", "val_loss", "grad_norm", "router")
"""what the arithmetic of the CPU takes part in"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The metrics of the steps that today's command trains when it resumes the folder."""
    folder = tmp_path_factory.mktemp("earlier") / "work"
    shutil.copytree(EARLIER, folder)
    how = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = forked.run_module("hamner.train", "--resume", "--run-dir", "run", **how)
    assert done.returncode == 0, done.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][8:]


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((EARLIER / "expected.json").read_text())


def test_steps_data_and_schedule_go_on_exactly(rows, expected):
    for row, before in zip(rows, expected["rows"], strict=True):
        assert {name: row[name] for name in before if name not in TRAINED} == {
            name: value for name, value in before.items() if name not in TRAINED
        }


def test_losses_are_the_same_within_the_rounding_of_another_cpu(rows, expected):
    for row, before in zip(rows, expected["rows"], strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            assert row[name] == pytest.approx(before[name], rel=2e-6), name


def test_losses_are_the_same_bits_on_the_kind_of_cpu_that_made_them(rows, expected):
    here = {
        "torch": torch.__version__.split("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if here != expected["made_with"]:
        pytest.skip(f"made with {expected['made_with']}, not {here}: other matmul kernels round")
    # Evaluations may take larger passes than they did, which adds up in another order.
    names = [name for name in TRAINED if name != "val_loss"]
    for row, before in zip(rows, expected["rows"], strict=True):
        assert {name: row[name] for name in names} == {name: before[name] for name in names}
