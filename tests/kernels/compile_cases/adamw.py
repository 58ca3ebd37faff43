"""AdamW compiles for bf16 parameters (scalars on the device) and fp32 ones (from the host).

Beside bf16 stands a whole master, or its remainder (scalars from the host, as in the trainer).
"""

import triton.language as tl

from hamner.kernels.adamw import (
    CONFIGS,
    NORM_BLOCK,
    NORM_WARPS,
    adamw_kernel,
    sum_squares_kernel,
)
from hamner.kernels.launch import CAPABILITIES
from tests.kernels.compile_gate import CompileCase

TABLE = {
    "addresses_ptr": "*i64",
    "numels_ptr": "*i64",
    "chunks_ptr": "*i32",
    "num_tensors": "i32",
}


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for case in (
            _case(
                "bf16",
                capability,
                {"lr_ptr": "*fp32", "step_ptr": "*i64"},
                {"MASTER": tl.float32, "GRAD": tl.bfloat16, "PARAM": tl.bfloat16},
            ),
            _case(
                "bf16, split master",
                capability,
                {},
                {"MASTER": tl.int16, "GRAD": tl.bfloat16, "PARAM": tl.bfloat16},
            ),
            _case(
                "fp32", capability, {}, {"MASTER": tl.float32, "GRAD": tl.float32, "PARAM": None}
            ),
            CompileCase(
                name="global_grad_norm",
                kernel=sum_squares_kernel,
                signature={**TABLE, "partial_ptr": "*fp32"},
                constexprs={"DTYPE": tl.bfloat16, "ALIGNED": True, "BLOCK": NORM_BLOCK},
                num_warps=NORM_WARPS,
                capability=capability,
            ),
        )
    ]


def _case(
    name: str, capability: str, on_device: dict[str, str], dtypes: dict[str, tl.dtype | None]
) -> CompileCase:
    config = CONFIGS[capability]
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
    pointers = {"lr_ptr": None, "step_ptr": None, **on_device}
    blocks = {"CHUNK": config.chunk, "BLOCK": config.block}
    return CompileCase(
        name=f"adamw/{name}",
        kernel=adamw_kernel,
        signature={**TABLE, "clip_coef_ptr": "*fp32", **pointers, **scalars},
        constexprs={**dtypes, **blocks, "ALIGNED": True},
        num_warps=config.warps,
        capability=capability,
    )
