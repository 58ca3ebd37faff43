"""In a capture of several processes all take the same steps; rank 0 writes what it saw."""

from dataclasses import replace

import pytest

from hamner.config.train import TrainConfig
from hamner.profile.capture import capture
from hamner.profile.summary import summarize
from hamner.profile.trace import read_trace
from tests.parallel.jobs import enter, run_job, said
from tests.train.test_loop import small_config

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.timeout(300)]


def capture_both(ports: list[int], config: TrainConfig) -> None:
    """The function is the body of a process."""
    for engine in ("ddp", "fsdp"):
        enter(ports)
        folder = config.run_dir / engine
        summary = capture(replace(config, parallel=engine), folder, steps=2, warmup=1)
        print("no summary" if summary is None else "a summary")


def test_rank_0_writes_the_capture_of_all(tmp_path):
    config = replace(small_config(tmp_path), micro_batch_size=2)
    codes = run_job(capture_both, 2, tmp_path / "said", config)
    assert codes == [0, 0], said(tmp_path / "said", 2)
    for engine in ("ddp", "fsdp"):
        folder = config.run_dir / engine
        files = {"trace.json.gz", "memory.json.gz", "memory.png", "summary.md", "summary.json"}
        assert {path.name for path in folder.iterdir()} == files
        summary = summarize(read_trace(folder / "trace.json.gz"))
        assert (summary.steps, summary.gpus) == (2, 2)
        assert summary.categories["communication"] > 0
        # On a CPU no message runs beside the arithmetic of the same process.
        assert summary.communication is None
    first, second = ((tmp_path / "said" / f"rank_{n}.txt").read_text() for n in range(2))
    assert first.count("a summary") == 2 and "matmul" in first
    assert second.count("no summary") == 2 and "matmul" not in second
