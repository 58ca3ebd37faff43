"""The pictures of a run."""

import matplotlib.pyplot as plt

from hamner import plots
from hamner.run_folder import RunFolder, append_record


def record(step: int, **values) -> dict:
    return {
        "step": step,
        "tokens": 100 * step,
        "loss": 8.0 - step,
        "tokens_per_second": 5.0,
    } | values


def test_validation_is_drawn_where_it_was_made():
    """Each record repeats the latest evaluation."""
    records = [
        record(1),
        record(2, val_loss=6.0, val_step=2),
        record(3, val_loss=6.0, val_step=2),
        record(4, val_loss=4.5, val_step=4),
        record(5, val_loss=4.5, val_step=4),
    ]
    _, axes = plt.subplots()
    plots._loss(axes, records)
    training, validation = axes.lines
    assert list(training.get_xdata()) == [100, 200, 300, 400, 500]
    assert list(validation.get_xdata()) == [200, 400]
    assert list(validation.get_ydata()) == [6.0, 4.5]
    plt.close()


def test_vram_is_drawn_only_with_a_gpu(tmp_path):
    run = RunFolder(tmp_path)
    run.plots.mkdir()
    assert plots.draw(run) == []
    append_record(run.metrics, record(1, peak_vram_gib=None))
    assert [path.name for path in plots.draw(run)] == ["loss.png", "throughput.png"]
    append_record(run.metrics, record(2, peak_vram_gib=3.5))
    assert [path.name for path in plots.draw(run)] == ["loss.png", "throughput.png", "vram.png"]
