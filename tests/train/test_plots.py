"""The pictures of a run."""

import matplotlib.pyplot as plt

from hamner.checkpoint.run_folder import RunFolder, append_record
from hamner.train import plots


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


def routed(step: int, load: object, entropy: object) -> dict:
    return record(step, router={"load": load, "entropy": entropy})


def test_routers_are_drawn_by_layer_in_fair_shares():
    records = [
        routed(1, [[0.5, 0.5], [0.9, 0.1]], [0.69, 0.3]),
        routed(2, [[0.6, 0.4], [0.8, 0.2]], [0.68, 0.4]),
    ]
    _, (load, entropy) = plt.subplots(2)
    plots._expert_load(load, records)
    plots._router_entropy(entropy, records)
    *drawn, fair = [list(line.get_ydata()) for line in load.lines]
    assert drawn == [[1.0, 1.2], [1.0, 0.8], [1.8, 1.6], [0.2, 0.4]]
    assert fair == [1.0, 1.0]
    assert list(load.lines[0].get_xdata()) == [100, 200]
    assert [list(line.get_ydata()) for line in entropy.lines] == [[0.69, 0.68], [0.3, 0.4]]
    plt.close()


def test_routers_are_drawn_only_for_mixtures(tmp_path):
    run = RunFolder(tmp_path)
    run.plots.mkdir()
    append_record(run.metrics, record(1))
    for load, entropy in (
        ("much", [1.0]),
        ([], []),
        ([[]], [1.0]),
        ([[0.5, "half"]], [1.0]),
        ([[0.5, 0.5]], []),
        ([0.5], [1.0]),
    ):
        append_record(run.metrics, routed(2, load, entropy))
    assert [path.name for path in plots.draw(run)] == ["loss.png", "throughput.png"]
    append_record(run.metrics, routed(3, [[0.5, 0.5], [0.9, 0.1]], [0.6, 0.3]))
    append_record(run.metrics, routed(4, [[0.5, 0.5]], [0.6]))
    names = [path.name for path in plots.draw(run)]
    assert names == ["loss.png", "throughput.png", "router.png"]


def test_vram_is_drawn_only_with_a_gpu(tmp_path):
    run = RunFolder(tmp_path)
    run.plots.mkdir()
    assert plots.draw(run) == []
    append_record(run.metrics, record(1, peak_vram_gib=None))
    assert [path.name for path in plots.draw(run)] == ["loss.png", "throughput.png"]
    append_record(run.metrics, record(2, peak_vram_gib=3.5))
    assert [path.name for path in plots.draw(run)] == ["loss.png", "throughput.png", "vram.png"]
