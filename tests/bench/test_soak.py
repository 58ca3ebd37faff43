"""What the soak says of memory: growth is found, and not where short starts only differ."""

import json
import random

import pytest

from bench.faulty_train import Faults
from bench.soak import Run, Soak, is_flat


@pytest.mark.parametrize(
    ("seconds", "starts", "mib_a_minute", "flat"),
    [
        (600, 1, 0.1, True),
        (600, 1, 2.0, False),
        (80, 8, 0.1, True),
        (80, 8, 200.0, False),
    ],
    ids=["one flat", "one grows", "short ones flat", "short ones grow"],
)
def test_growth(seconds, starts, mib_a_minute, flat, tmp_path):
    """Around 650 MiB, with the scatter of short starts that a run of option tiny had."""
    run = Run(Soak(output=tmp_path), "disturbed", Faults())
    chance = random.Random(0)
    with run.diary.open("w") as diary:
        for pid in range(starts):
            tilt = chance.gauss(0, 60) if starts > 1 else 0.0  # MiB a minute
            for second in range(seconds):
                rss = 650 + (tilt + mib_a_minute) * second / 60 + chance.gauss(0, 10)
                line = {"pid": pid, "seconds": second, "rss_mib": rss, "files": 7}
                diary.write(json.dumps({**line, "vram_mib": 0, "reserved_mib": 0}) + "\n")
    assert is_flat(run) == flat


def test_starts_that_were_too_short_are_not_judged(tmp_path, capsys):
    run = Run(Soak(output=tmp_path), "disturbed", Faults())
    run.diary.write_text("")
    assert not is_flat(run)
    assert "no start was watched long enough" in capsys.readouterr().out
