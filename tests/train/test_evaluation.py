"""Early stopping, loss by loss."""

import json
import math

from hamner.train.evaluation import EarlyStopping


def test_stops_after_so_many_evaluations_without_a_better_loss():
    stopping = EarlyStopping(2)
    losses = [3.0, 2.0, 2.0, 1.9, 2.5, 1.9]
    improved = [stopping.improved(step, loss) for step, loss in enumerate(losses)]
    assert improved == [True, True, False, True, False, False]
    assert stopping.exhausted
    assert (stopping.best_step, stopping.best_loss) == (3, 1.9)


def test_one_better_loss_is_enough_to_go_on():
    stopping = EarlyStopping(2)
    for loss in (3.0, 3.5, 2.9, 3.0):
        stopping.improved(1, loss)
    assert not stopping.exhausted


def test_not_a_number_is_no_improvement():
    stopping = EarlyStopping(1)
    assert not stopping.improved(1, math.nan)
    assert stopping.exhausted


def test_without_patience_or_validation_data_nothing_happens():
    for stopping, loss in ((EarlyStopping(0), 1.0), (EarlyStopping(1), None)):
        assert not stopping.improved(1, loss)
        assert not stopping.exhausted


def test_state_goes_on_and_is_json():
    for losses in ([], [2.0, 3.0]):
        stopping = EarlyStopping(2)
        for loss in losses:
            stopping.improved(1, loss)
        resumed = EarlyStopping(2)
        resumed.load_state_dict(json.loads(json.dumps(stopping.state_dict(), allow_nan=False)))
        assert [resumed.improved(9, 2.5), resumed.exhausted] == [
            stopping.improved(9, 2.5),
            stopping.exhausted,
        ]
