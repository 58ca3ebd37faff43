"""The gradient of a tied embedding; one launch configuration for all cards."""

from hamner.kernels.embedding import (
    BLOCK_D,
    BLOCK_N,
    NUM_WARPS,
    embedding_long_runs_kernel,
    embedding_runs_kernel,
)
from hamner.kernels.launch import CAPABILITIES
from tests.kernels.compile_gate import CompileCase

RUNS = {
    "d_x_ptr": "*bf16",
    "keys_ptr": "*i32",
    "order_ptr": "*i64",
    "d_weight_ptr": "*bf16",
    "partials_ptr": "*fp32",
    "N": "i32",
    "D": "i32",
}
LONG_RUNS = {name: kind for name, kind in RUNS.items() if name not in ("d_x_ptr", "order_ptr")}


def cases() -> list[CompileCase]:
    return [
        CompileCase(
            name=name,
            kernel=kernel,
            signature=signature,
            constexprs={"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D},
            num_warps=NUM_WARPS,
            capability=capability,
            divisible_by_16=("N", "D"),
        )
        for capability in CAPABILITIES
        for name, kernel, signature in (
            ("embedding_runs", embedding_runs_kernel, RUNS),
            ("embedding_long_runs", embedding_long_runs_kernel, LONG_RUNS),
        )
    ]
