"""Rotation of a packed qkv, forward in place and inverse out of place, at head sizes 64 and 128."""

from hamner.kernels.launch import CAPABILITIES
from hamner.kernels.rope import CONFIGS, rope_kernel
from tests.kernels.compile_gate import CompileCase

HEAD_SIZES = (64, 128)


def cases() -> list[CompileCase]:
    return [
        _case(capability, head_dim, inverse, has_positions)
        for capability in CAPABILITIES
        for head_dim in HEAD_SIZES
        for inverse in (False, True)
        for has_positions in (False, True)
    ]


def _case(capability: str, head_dim: int, inverse: bool, has_positions: bool) -> CompileCase:
    config = CONFIGS[capability]
    return CompileCase(
        name=f"rope/head={head_dim},inverse={inverse},positions={has_positions}",
        kernel=rope_kernel,
        signature={
            "x_ptr": "*bf16",
            "out_ptr": "*bf16",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "positions_ptr": "*i32" if has_positions else None,
            "N": "i32",
            "seq_len": "i32",
            "num_positions": "i32",
            "row_size": "i32",
        },
        constexprs={
            "NUM_ROTATED": 20,
            "NUM_HEADS": 24 if inverse else 20,
            "HEAD_DIM": head_dim,
            "INVERSE": inverse,
            "BLOCK_M": config.block_m,
            "BLOCK_H": config.block_h,
            "BLOCK_HALF": head_dim // 2,
        },
        num_warps=config.warps,
        capability=capability,
        divisible_by_16=("N", "seq_len", "num_positions", "row_size"),
    )
