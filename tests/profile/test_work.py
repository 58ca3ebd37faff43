"""What operations must do, from their recorded arguments."""

from dataclasses import replace

import pytest

from hamner.hardware import GPUS
from hamner.profile.trace import Range
from hamner.profile.work import work_of

BF16, FP32 = "c10::BFloat16", "float"


@pytest.mark.parametrize(("with_copies", "size"), [(True, 26), (False, 28)])
def test_bytes_an_element_of_adamw(with_copies, size):
    shapes = [[30, 7], [5]]
    operation = Range(
        "hamner::adamw_",
        0,
        1,
        is_operation=True,
        dims=[shapes if with_copies else [], *[shapes] * 4, []],
        types=["TensorList"] * 5 + [FP32],
    )
    _, work = work_of("optimizer", operation)
    assert work.bytes == size * (30 * 7 + 5)
    assert work.flops == 0


@pytest.mark.parametrize("name", ["adamw_", "muon_momentum_", "muon_apply_"])
def test_an_optimizer_of_which_no_shapes_were_recorded_has_no_known_work(name):
    """The profiler leaves them out of a list of more than 30 tensors."""
    types = ["TensorList"] * 5 + [FP32]
    operation = Range(
        f"hamner::{name}", 0, 1, is_operation=True, dims=[[], [], [], [], [], []], types=types
    )
    assert work_of("optimizer", operation) is None


@pytest.mark.parametrize(
    ("name", "arguments", "passes"),
    [
        ("hamner::qk_norm_rope", 1, 2),
        ("hamner::qk_norm_rope_backward", 2, 3),
        ("hamner::qk_norm_rope_backward_", 2, 3),
    ],
)
def test_bytes_of_qk_norm_are_those_of_q_and_k(name, arguments, passes):
    vectors = [[16], [16], [10, 8], [10, 8], []]
    packed = [[3, 10, (4 + 2 * 2) * 16]] * arguments
    operation = Range(
        name,
        0,
        1,
        is_operation=True,
        dims=[*packed, *vectors, [], [], []],
        types=[BF16] * arguments + [FP32] * 4 + ["", "Scalar", "Scalar", "Scalar"],
        values=[""] * (arguments + 5) + ["4", "2", "1e-05"],
    )
    _, work = work_of("rope", operation)
    assert work.bytes == passes * 2 * 3 * 10 * (4 + 2) * 16


def test_work_of_muon():
    """Of split masters in bf16: three matrices of 7 x 5, and two products of 6 x 10."""
    lists, split = [[7, 5]] * 3, {"types": ["TensorList"] * 3 + [FP32]}
    square, x = [2, 6, 6], [2, 6, 10]
    for name, dims, recorded, bytes_, flops in (
        ("muon_momentum_", [lists, lists, lists, []], split, 3 * 35 * 12, 0),
        ("muon_apply_", [lists, lists, lists, []], split, 3 * 35 * 10, 0),
        ("muon_apply_", [[], lists, lists, []], split, 3 * 35 * 12, 0),
        ("symmetric_product_", [x, []], {"types": [BF16, ""]}, 2 * 2 * 96, 2 * 360),
        ("symmetric_product_", [square] * 2, {"types": [BF16] * 2}, 2 * 2 * 90, 2 * 216),
    ):
        operation = Range(f"hamner::{name}", 0, 1, is_operation=True, dims=dims, **recorded)
        _, work = work_of("optimizer", operation)
        assert (work.bytes, work.flops) == (bytes_, flops), name


def test_bytes_of_the_router_projection():
    x, weight, d_logits = [30, 8], [4, 8], [30, 4]
    for name, dims, types, size in (
        ("hamner::router_linear", [x, weight], [BF16, BF16], 2 * 30 * 8 + 4 * 30 * 4),
        (
            "hamner::router_linear_backward",
            [d_logits, x, weight],
            [FP32, BF16, BF16],
            4 * 30 * 4 + 2 * 2 * 30 * 8,
        ),
    ):
        operation = Range(name, 0, 1, is_operation=True, dims=dims, types=types)
        _, work = work_of("routing", operation)
        assert (work.bytes, work.flops) == (size, 0)


@pytest.mark.parametrize("quantises", [True, False])
@pytest.mark.parametrize(
    ("category", "name", "dims", "position", "bytes_", "quantised"),
    [
        # d_out (30, 4), gate_up (30, 16), no result kept.
        ("swiglu", "swiglu", [[30, 4], [30, 16], [], [4, 8]], 6, 2 * 6 * 30 * 8, 30 * 16),
        # d_out (30, 4), d_residual and x (30, 8), rstd, no result kept.
        ("norm", "rms_norm", [[30, 4], [30, 8], [30, 8], [30], []], 17, 2 * 5 * 30 * 8, 30 * 8),
    ],
)
def test_bytes_of_a_gradient_that_is_written_in_int8_too(
    category, name, dims, position, bytes_, quantised, quantises
):
    operation = Range(
        f"hamner::{name}_linear_backward",
        0,
        1,
        is_operation=True,
        dims=dims,
        types=[BF16 if shape else "" for shape in dims],
        values=[""] * position + [str(quantises)],
    )
    _, work = work_of(category, operation)
    assert work.bytes == bytes_ + quantises * quantised


def test_work_of_int8():
    """A matmul of (30, 8) by (20, 8), and a matrix that is quantised."""
    operation = Range(
        "hamner::int8_matmul",
        0,
        1,
        is_operation=True,
        dims=[[30, 8], [1, 30], [20, 8], [1, 20], []],
        types=["signed char", FP32, "signed char", FP32, "Scalar"],
    )
    _, work = work_of("matmul", operation)
    assert work.flops == work.int8_flops == 2 * 30 * 8 * 20
    assert work.bytes == 30 * 8 + 20 * 8 + 2 * 30 * 20
    card = replace(GPUS["rtx-3090"], bandwidth_gbs=1e9)
    assert work.floor_seconds(card, "bf16") == pytest.approx(work.flops / 284e12)
    half = work * 0.5 + work * 0.5
    assert half == work
    quantized = Range(
        "hamner::quantize_int8", 0, 1, is_operation=True, dims=[[30, 8]], types=[BF16]
    )
    _, work = work_of("matmul", quantized)
    assert (work.bytes, work.flops) == (3 * 30 * 8, 0)
