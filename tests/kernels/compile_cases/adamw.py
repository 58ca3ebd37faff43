"""AdamW on bf16 parameters (scalars on the device) and on fp32 ones (scalars from the host)."""

from hamner.kernels.adamw import (
    CONFIGS,
    NORM_BLOCK,
    NORM_WARPS,
    adamw_kernel,
    sum_squares_kernel,
)
from hamner.kernels.launch import CAPABILITIES
from tests.kernels.compile_gate import CompileCase


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for case in (
            _case(
                "bf16",
                capability,
                {
                    "param_ptr": "*bf16",
                    "grad_ptr": "*bf16",
                    "lr_ptr": "*fp32",
                    "step_ptr": "*i64",
                },
                {},
            ),
            _case(
                "fp32",
                capability,
                {"grad_ptr": "*fp32"},
                {"param_ptr": None, "lr_ptr": None, "step_ptr": None},
            ),
            CompileCase(
                name="global_grad_norm",
                kernel=sum_squares_kernel,
                signature={"x_ptr": "*bf16", "partial_ptr": "*fp32", "numel": "i32"},
                constexprs={"BLOCK": NORM_BLOCK},
                num_warps=NORM_WARPS,
                num_stages=3,
                capability=capability,
                divisible_by_16=("numel",),
            ),
        )
    ]


def _case(
    name: str, capability: str, pointers: dict[str, str], absent: dict[str, None]
) -> CompileCase:
    config = CONFIGS[capability]
    states = dict.fromkeys(
        ("master_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "clip_coef_ptr"), "*fp32"
    )
    scalars = dict.fromkeys(
        (
            "lr",
            "step",
            "one_minus_beta1",
            "log_beta1",
            "one_minus_beta2",
            "log_beta2",
            "eps",
            "weight_decay",
        ),
        "fp32",
    )
    return CompileCase(
        name=f"adamw/{name}",
        kernel=adamw_kernel,
        signature={**pointers, **states, **scalars, "numel": "i32"},
        constexprs={**absent, "BLOCK": config.block},
        num_warps=config.warps,
        num_stages=3,
        capability=capability,
        divisible_by_16=("numel",),
    )
