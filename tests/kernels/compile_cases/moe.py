"""Mixture-of-experts kernels compile at option c's shape, routing also at its limits."""

import triton

from hamner.kernels import grouped_matmul as grouped
from hamner.kernels import moe_routing
from hamner.kernels.launch import CAPABILITIES
from tests.kernels.compile_gate import CompileCase

WIDTH, INTERMEDIATE, EXPERTS, TOP_K = 768, 1536, 4, 2


def cases() -> list[CompileCase]:
    found = []
    for capability in CAPABILITIES:
        found += _routing(capability, EXPERTS, TOP_K, renormalize=True, biased=False)
        largest = moe_routing.MAX_EXPERTS, moe_routing.MAX_EXPERTS_PER_TOKEN
        found += _routing(capability, *largest, renormalize=False, biased=True)
        found += _matmuls(capability, "bf16", grouped.CONFIGS[capability])
        found += _matmuls(capability, "fp32", grouped.FLOAT32_CONFIG)
        found += _row_passes(capability)
    return found


def _routing(
    capability: str, experts: int, top_k: int, *, renormalize: bool, biased: bool
) -> list[CompileCase]:
    shape = {"NUM_EXPERTS": experts, "TOP_K": top_k, **moe_routing.block_shape(experts)}
    suffix = f"E={experts}/K={top_k}"
    return [
        CompileCase(
            name=f"route/{suffix}",
            kernel=moe_routing.route_kernel,
            signature={
                "logits_ptr": "*fp32",
                "bias_ptr": "*fp32" if biased else None,
                "weights_ptr": "*fp32",
                "experts_ptr": "*i32",
                "counts_ptr": "*i32",
                "partials_ptr": "*fp32",
                "num_tokens": "i32",
            },
            constexprs={
                **shape,
                "RENORMALIZE": renormalize,
                "BLOCK_K": triton.next_power_of_2(top_k),
            },
            num_warps=moe_routing.NUM_WARPS,
            capability=capability,
        ),
        CompileCase(
            name=f"scan/{suffix}",
            kernel=moe_routing.scan_kernel,
            signature={
                "counts_ptr": "*i32",
                "partials_ptr": "*fp32",
                "totals_ptr": "*i32",
                "sums_ptr": "*fp32",
                "num_blocks": "i32",
            },
            constexprs={"NUM_EXPERTS": experts, "BLOCK": moe_routing.SCAN_BLOCK},
            num_warps=moe_routing.SCAN_WARPS,
            capability=capability,
        ),
        CompileCase(
            name=f"scatter/{suffix}",
            kernel=moe_routing.scatter_kernel,
            signature={
                "experts_ptr": "*i32",
                "prefix_ptr": "*i32",
                "totals_ptr": "*i32",
                "sums_ptr": "*fp32",
                "order_ptr": "*i32",
                "offsets_ptr": "*i32",
                "load_balancing_loss_ptr": "*fp32",
                "z_loss_ptr": "*fp32",
                "entropy_ptr": "*fp32",
                "load_ptr": "*fp32",
                "num_tokens": "i32",
            },
            constexprs=shape,
            num_warps=moe_routing.NUM_WARPS,
            capability=capability,
        ),
        CompileCase(
            name=f"route_backward/{suffix}",
            kernel=moe_routing.route_backward_kernel,
            signature={
                "logits_ptr": "*fp32",
                "experts_ptr": "*i32",
                "offsets_ptr": "*i32",
                "d_weights_ptr": "*fp32",
                "d_load_balancing_loss_ptr": "*fp32",
                "d_z_loss_ptr": "*fp32",
                "d_logits_ptr": "*fp32",
                "num_tokens": "i32",
            },
            constexprs={**shape, "RENORMALIZE": renormalize},
            num_warps=moe_routing.NUM_WARPS,
            capability=capability,
        ),
    ]


def _matmuls(capability: str, dtype: str, config: grouped.Config) -> list[CompileCase]:
    pointer = f"*{dtype}"
    groups = {"NUM_EXPERTS": EXPERTS, "TOP_K": TOP_K}
    found = [
        CompileCase(
            name=f"gate_up/{dtype}",
            kernel=grouped.gate_up_kernel,
            signature={
                "x_ptr": pointer,
                "routing_weights_ptr": "*fp32",
                "order_ptr": "*i32",
                "offsets_ptr": "*i32",
                "weight_ptr": pointer,
                "gate_up_ptr": pointer,
                "hidden_ptr": pointer,
                "stride_x": "i32",
            },
            constexprs={
                **groups,
                "WIDTH": WIDTH,
                "INTERMEDIATE": INTERMEDIATE,
                **_blocks(config.gate_up._asdict()),
            },
            num_warps=config.gate_up.num_warps,
            num_stages=config.gate_up.num_stages,
            capability=capability,
            divisible_by_16=("stride_x",),
        )
    ]
    for name, num_cols, num_inner, gather, transposed in (
        ("down", WIDTH, INTERMEDIATE, False, True),
        ("d_hidden", INTERMEDIATE, WIDTH, True, False),
        ("d_x", WIDTH, 2 * INTERMEDIATE, False, False),
    ):
        found.append(
            CompileCase(
                name=f"grouped_matmul/{name}/{dtype}",
                kernel=grouped.grouped_matmul_kernel,
                signature={
                    "a_ptr": pointer,
                    "weight_ptr": pointer,
                    "order_ptr": "*i32",
                    "offsets_ptr": "*i32",
                    "out_ptr": pointer,
                },
                constexprs={
                    **groups,
                    "NUM_COLS": num_cols,
                    "NUM_INNER": num_inner,
                    "GATHER": gather,
                    "TRANSPOSED": transposed,
                    **_blocks(config.matmul._asdict()),
                },
                num_warps=config.matmul.num_warps,
                num_stages=config.matmul.num_stages,
                capability=capability,
            )
        )
    for name, num_out, num_in, gather_d_out in (
        ("down", WIDTH, INTERMEDIATE, True),
        ("gate_up", 2 * INTERMEDIATE, WIDTH, False),
    ):
        found.append(
            CompileCase(
                name=f"weight_grad/{name}/{dtype}",
                kernel=grouped.weight_grad_kernel,
                signature={
                    "d_out_ptr": pointer,
                    "input_ptr": pointer,
                    "order_ptr": "*i32",
                    "offsets_ptr": "*i32",
                    "d_weight_ptr": pointer,
                    "stride_input": "i32",
                },
                constexprs={
                    "TOP_K": TOP_K,
                    "NUM_OUT": num_out,
                    "NUM_IN": num_in,
                    "GATHER_D_OUT": gather_d_out,
                    **_blocks(config.weight_grad._asdict()),
                },
                num_warps=config.weight_grad.num_warps,
                num_stages=config.weight_grad.num_stages,
                capability=capability,
                divisible_by_16=("stride_input",),
            )
        )
    return found


def _blocks(config: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in config.items() if name.startswith("BLOCK_")}


def _row_passes(capability: str) -> list[CompileCase]:
    return [
        CompileCase(
            name="swiglu_grad",
            kernel=grouped.swiglu_grad_kernel,
            signature={
                "gate_up_ptr": "*bf16",
                "d_hidden_ptr": "*bf16",
                "routing_weights_ptr": "*fp32",
                "order_ptr": "*i32",
                "d_gate_up_ptr": "*bf16",
                "d_routing_weights_ptr": "*fp32",
                "num_rows": "i32",
            },
            constexprs={
                "INTERMEDIATE": INTERMEDIATE,
                "RECOMPUTE": True,
                **_blocks(grouped.SWIGLU_GRAD_CONFIG),
            },
            num_warps=grouped.SWIGLU_GRAD_CONFIG["num_warps"],
            capability=capability,
        ),
        CompileCase(
            name="sum_slots",
            kernel=grouped.sum_slots_kernel,
            signature={"slots_ptr": "*bf16", "out_ptr": "*bf16", "num_tokens": "i32"},
            constexprs={
                "TOP_K": TOP_K,
                "WIDTH": WIDTH,
                **_blocks(grouped.SUM_SLOTS_CONFIG),
            },
            num_warps=grouped.SUM_SLOTS_CONFIG["num_warps"],
            capability=capability,
        ),
    ]
