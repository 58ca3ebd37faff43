"""qk-norm with RoPE of 16 + 4 heads: of size 64 by itself, and of 128 with v and documents."""

from hamner.kernels.launch import CAPABILITIES
from hamner.kernels.qk_norm import (
    CONFIGS,
    qk_norm_rope_backward_kernel,
    qk_norm_rope_kernel,
    tile_shape,
)
from tests.kernels.compile_gate import CompileCase

POINTERS = {
    "qkv_ptr": "*bf16",
    "q_weight_ptr": "*fp32",
    "k_weight_ptr": "*fp32",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
}
NUMBERS = {"N": "i32", "seq_len": "i32", "num_positions": "i32", "row_size": "i32", "eps": "fp32"}
DIVISIBLE = ("N", "seq_len", "num_positions", "row_size")


def cases() -> list[CompileCase]:
    return [
        case(capability, *shape)
        for capability in CAPABILITIES
        for shape in ((64, False, False), (128, True, True))
        for case in (_forward, _backward)
    ]


def _shared(tile: int, head_dim: int, with_v: bool, has_positions: bool) -> tuple[dict, dict]:
    """The parameters that both kernels have: the signature's part, and the constexprs."""
    written = 24 if with_v else 20
    block_m, block_h, block_half = tile_shape(tile, written, head_dim)
    positions = {"positions_ptr": "*i32" if has_positions else None}
    constexprs = {
        "NUM_Q": 16,
        "NUM_NORMED": 20,
        "NUM_HEADS": written,
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_H": block_h,
        "BLOCK_HALF": block_half,
    }
    return {**POINTERS, **positions, **NUMBERS}, constexprs


def _forward(capability: str, head_dim: int, with_v: bool, has_positions: bool) -> CompileCase:
    config = CONFIGS[capability]
    signature, constexprs = _shared(config.forward_tile, head_dim, with_v, has_positions)
    return CompileCase(
        name=f"qk_norm_rope/head={head_dim},v={with_v},positions={has_positions}",
        kernel=qk_norm_rope_kernel,
        signature={**signature, "out_ptr": "*bf16"},
        constexprs=constexprs,
        num_warps=config.forward_warps,
        capability=capability,
        divisible_by_16=DIVISIBLE,
    )


def _backward(capability: str, head_dim: int, with_v: bool, has_positions: bool) -> CompileCase:
    config = CONFIGS[capability]
    signature, constexprs = _shared(config.backward_tile, head_dim, with_v, has_positions)
    pointers = {"d_out_ptr": "*bf16", "d_qkv_ptr": "*bf16", "d_weights_ptr": "*fp32"}
    return CompileCase(
        name=f"qk_norm_rope_backward/head={head_dim},v={with_v},positions={has_positions}",
        kernel=qk_norm_rope_backward_kernel,
        signature={**signature, **pointers, "rows_per_program": "i32"},
        constexprs=constexprs,
        num_warps=config.backward_warps,
        capability=capability,
        divisible_by_16=DIVISIBLE,
    )
