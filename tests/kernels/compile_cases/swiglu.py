"""SwiGLU at the intermediate sizes of the options."""

from hamner.kernels.launch import CAPABILITIES
from hamner.kernels.swiglu import (
    CONFIGS,
    backward_tile,
    forward_tile,
    swiglu_backward_kernel,
    swiglu_forward_kernel,
)
from tests.kernels.compile_gate import CompileCase

INTERMEDIATE_SIZES = (704, 1536, 2048, 2816)


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for intermediate in INTERMEDIATE_SIZES
        for case in (_forward(capability, intermediate), _backward(capability, intermediate))
    ] + [
        case
        for capability in CAPABILITIES
        for case in (
            _forward(capability, 2816, quantises=True),
            _backward(capability, 2816, quantises=True),
        )
    ]


def _forward(capability: str, intermediate: int, *, quantises: bool = False) -> CompileCase:
    block_m, block_i, warps = forward_tile(CONFIGS[capability], intermediate, quantises=quantises)
    return CompileCase(
        name=f"swiglu_forward/I={intermediate}{'/int8' if quantises else ''}",
        kernel=swiglu_forward_kernel,
        signature={
            "gate_up_ptr": "*bf16",
            "h_ptr": "*bf16",
            "values_ptr": "*i8" if quantises else None,
            "scales_ptr": "*fp32" if quantises else None,
            "N": "i32",
        },
        constexprs={"INTERMEDIATE": intermediate, "BLOCK_M": block_m, "BLOCK_I": block_i},
        num_warps=warps,
        capability=capability,
        divisible_by_16=("N",),
    )


def _backward(capability: str, intermediate: int, *, quantises: bool = False) -> CompileCase:
    block_m, block_i, warps = backward_tile(CONFIGS[capability], intermediate, quantises=quantises)
    return CompileCase(
        name=f"swiglu_backward/I={intermediate}{'/int8' if quantises else ''}",
        kernel=swiglu_backward_kernel,
        signature={
            "d_h_ptr": "*bf16",
            "gate_up_ptr": "*bf16",
            "d_gate_up_ptr": "*bf16",
            "values_ptr": "*i8" if quantises else None,
            "scales_ptr": "*fp32" if quantises else None,
            "h_ptr": "*bf16",
            "N": "i32",
        },
        constexprs={"INTERMEDIATE": intermediate, "BLOCK_M": block_m, "BLOCK_I": block_i},
        num_warps=warps,
        capability=capability,
        divisible_by_16=("N",),
    )
