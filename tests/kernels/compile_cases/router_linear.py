"""The router's projection compiles at option c's shape and at its largest E and width."""

from hamner.kernels.launch import CAPABILITIES, tile_shape
from hamner.kernels.moe_routing import MAX_EXPERTS
from hamner.kernels.rms_norm import MAX_WIDTH
from hamner.kernels.router_linear import (
    CONFIGS,
    router_linear_backward_kernel,
    router_linear_forward_kernel,
)
from tests.kernels.compile_cases.rms_norm import sum_partials
from tests.kernels.compile_gate import CompileCase

WIDTHS_AND_EXPERTS = ((768, 4), (1024, MAX_EXPERTS), (MAX_WIDTH, 2))


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for width, experts in WIDTHS_AND_EXPERTS
        for case in (
            *(
                direction(capability, dtype, width, experts)
                for dtype in ("bf16", "fp32")
                for direction in (_forward, _backward)
            ),
            sum_partials(capability, experts * width),
        )
    ]


def _forward(capability: str, dtype: str, width: int, experts: int) -> CompileCase:
    config = CONFIGS[capability]
    block_m, block_d, warps = tile_shape(config.forward_tile, config.forward_warps, width)
    return CompileCase(
        name=f"router_linear_forward/{dtype}/D={width}/E={experts}",
        kernel=router_linear_forward_kernel,
        signature={
            "x_ptr": f"*{dtype}",
            "weight_ptr": f"*{dtype}",
            "logits_ptr": "*fp32",
            "N": "i32",
        },
        constexprs={"D": width, "NUM_EXPERTS": experts, "BLOCK_M": block_m, "BLOCK_D": block_d},
        num_warps=warps,
        capability=capability,
    )


def _backward(capability: str, dtype: str, width: int, experts: int) -> CompileCase:
    config = CONFIGS[capability]
    return CompileCase(
        name=f"router_linear_backward/{dtype}/D={width}/E={experts}",
        kernel=router_linear_backward_kernel,
        signature={
            "d_logits_ptr": "*fp32",
            "x_ptr": f"*{dtype}",
            "weight_ptr": f"*{dtype}",
            "d_x_ptr": f"*{dtype}",
            "d_weight_ptr": "*fp32",
            "N": "i32",
        },
        constexprs={
            "D": width,
            "NUM_EXPERTS": experts,
            "BLOCK_M": config.backward_block_m,
            "BLOCK_D": config.backward_block_d,
        },
        num_warps=config.backward_warps,
        capability=capability,
    )
