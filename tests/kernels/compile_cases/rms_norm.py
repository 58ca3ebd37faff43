"""RMSNorm at the widths of the options (256 to 1024) and at the widest that is supported."""

from hamner.kernels import launch
from hamner.kernels.launch import CAPABILITIES, tile_shape
from hamner.kernels.rms_norm import (
    CONFIGS,
    MAX_WIDTH,
    rms_norm_backward_kernel,
    rms_norm_forward_kernel,
)
from tests.kernels.compile_gate import CompileCase

WIDTHS = (256, 768, 1024, MAX_WIDTH)


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for width in WIDTHS
        for case in (
            _forward(capability, width),
            _backward(capability, width),
            _backward(capability, width, quantises=True),
            sum_partials(capability, width),
        )
    ] + [
        _forward(capability, width, writes_y=writes_y, quantises=True)
        for capability in CAPABILITIES
        for width in (1024, MAX_WIDTH)
        for writes_y in (True, False)
    ]


def _forward(
    capability: str, width: int, *, writes_y: bool = True, quantises: bool = False
) -> CompileCase:
    config = CONFIGS[capability]
    block_m, block_d, warps = tile_shape(config.forward_tile, config.forward_warps, width)
    variant = ("" if writes_y else "/no y") + ("/int8" if quantises else "")
    return CompileCase(
        name=f"rms_norm_forward/D={width}{variant}",
        kernel=rms_norm_forward_kernel,
        signature={
            "x_ptr": "*bf16",
            "residual_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "y_ptr": "*bf16" if writes_y else None,
            "values_ptr": "*i8" if quantises else None,
            "scales_ptr": "*fp32" if quantises else None,
            "new_residual_ptr": "*bf16",
            "rstd_ptr": "*fp32",
            "N": "i32",
            "eps": "fp32",
        },
        constexprs={
            "D": width,
            "BLOCK_M": block_m,
            "BLOCK_D": block_d,
        },
        num_warps=warps,
        capability=capability,
        divisible_by_16=("N",),
    )


def _backward(capability: str, width: int, *, quantises: bool = False) -> CompileCase:
    config = CONFIGS[capability]
    block_m, block_d, warps = tile_shape(config.backward_tile, config.backward_warps, width)
    return CompileCase(
        name=f"rms_norm_backward/D={width}" + ("/int8" if quantises else ""),
        kernel=rms_norm_backward_kernel,
        signature={
            "d_y_ptr": "*bf16",
            "d_residual_ptr": "*bf16",
            "x_ptr": "*bf16",
            "weight_ptr": "*fp32",
            "rstd_ptr": "*fp32",
            "d_x_ptr": "*bf16",
            "d_weight_ptr": "*fp32",
            "y_ptr": "*bf16",
            "values_ptr": "*i8" if quantises else None,
            "scales_ptr": "*fp32" if quantises else None,
            "N": "i32",
            "rows_per_program": "i32",
        },
        constexprs={
            "D": width,
            "BLOCK_M": block_m,
            "BLOCK_D": block_d,
            "STAGES": config.backward_stages,
        },
        num_warps=warps,
        capability=capability,
        divisible_by_16=("N",),
    )


def sum_partials(capability: str, width: int) -> CompileCase:
    """The second pass over partial sums of `width` elements."""
    return CompileCase(
        name=f"sum_partials/D={width}",
        kernel=launch.sum_partials_kernel,
        signature={"partial_ptr": "*fp32", "out_ptr": "*fp32", "P": "i32"},
        constexprs={"D": width},
        num_warps=launch.NUM_WARPS,
        capability=capability,
    )
