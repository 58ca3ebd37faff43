"""AdamW on bf16 parameters (scalars on the device) and on fp32 ones (scalars from the host).

Beside bf16 a whole master, or its remainder (scalars from the host, as the trainer has them).
"""

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
                    "master_ptr": "*fp32",
                    "grad_ptr": "*bf16",
                    "lr_ptr": "*fp32",
                    "step_ptr": "*i64",
                },
                {"IS_SPLIT": False},
            ),
            _case(
                "bf16, split master",
                capability,
                {"param_ptr": "*i16", "master_ptr": "*i16", "grad_ptr": "*bf16"},
                {"IS_SPLIT": True, "lr_ptr": None, "step_ptr": None},
            ),
            _case(
                "fp32",
                capability,
                {"master_ptr": "*fp32", "grad_ptr": "*fp32"},
                {"IS_SPLIT": False, "param_ptr": None, "lr_ptr": None, "step_ptr": None},
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
    name: str, capability: str, pointers: dict[str, str], constexprs: dict[str, bool | None]
) -> CompileCase:
    config = CONFIGS[capability]
    states = dict.fromkeys(("exp_avg_ptr", "exp_avg_sq_ptr", "clip_coef_ptr"), "*fp32")
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
        constexprs={**constexprs, "BLOCK": config.block},
        num_warps=config.warps,
        num_stages=3,
        capability=capability,
        divisible_by_16=("numel",),
    )
