"""What operations must do, from their recorded arguments."""

import pytest

from hamner.profiling.trace import Range
from hamner.profiling.work import work_of

BF16, FP32 = "c10::BFloat16", "float"


@pytest.mark.parametrize(
    ("param", "master", "grad", "size"),
    [(BF16, "short int", BF16, 26), (BF16, FP32, BF16, 28), (BF16, FP32, FP32, 30)]
    + [("", FP32, FP32, 28)],
    ids=["split master", "whole master", "accumulated", "fp32"],
)
def test_bytes_an_element_of_adamw(param, master, grad, size):
    shape = [30, 7]
    operation = Range(
        "hamner::adamw_",
        0,
        1,
        is_operation=True,
        dims=[shape if param else [], *[shape] * 4, []],
        types=[param, master, grad, FP32, FP32, FP32],
    )
    _, work = work_of("optimizer", operation)
    assert work.bytes == size * 30 * 7
    assert work.flops == 0
