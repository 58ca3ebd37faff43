"""FlashAttention at head sizes 64 and 128, and 64 with values of 128 (differential attention).

Option A's heads, T a multiple of the tiles, causal, with and without documents, backward also with
RoPE's folded in. Strides are multiples of 16 elements at these sizes.
"""

from triton.runtime.jit import JITFunction

from hamner.kernels.flash_attention import (
    CONFIGS,
    Tile,
    flash_attention_dk_dv_kernel,
    flash_attention_dq_kernel,
    flash_attention_forward_kernel,
)
from hamner.kernels.launch import CAPABILITIES
from tests.kernels.compile_gate import CompileCase

KERNELS = {
    "forward": flash_attention_forward_kernel,
    "dq": flash_attention_dq_kernel,
    "dk_dv": flash_attention_dk_dv_kernel,
}
TENSOR = ("*bf16", "i32", "i32", "i32")  # its pointer and strides
TYPES = {
    **dict.fromkeys(("q", "k", "v", "d_out", "dq", "dk", "dv"), TENSOR),
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "documents": ("*i32", "*i32"),
    "tables": ("*fp32", "*fp32", "i32"),
    "positions_ptr": "*i32",
    "scale": "fp32",
    "scale_log2": "fp32",
    "T": "i32",
    "H": "i32",
    "KV": "i32",
}


def cases() -> list[CompileCase]:
    return [
        _case(capability, name, sizes, tile, documents, rotated)
        for capability in CAPABILITIES
        for sizes, config in CONFIGS[capability].items()
        for name, tile in config._asdict().items()
        for documents in (False, True)
        for rotated in ((False,) if name == "forward" else (False, True))
    ]


def _case(
    capability: str,
    name: str,
    sizes: tuple[int, int],
    tile: Tile,
    documents: bool,
    rotated: bool,
) -> CompileCase:
    kernel: JITFunction = KERNELS[name]
    head_size, v_head_size = sizes
    constexprs: dict[str, object] = {
        "GROUP": 4,
        "CAUSAL": True,
        "EVEN_T": True,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": v_head_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    if not documents:
        constexprs["documents"] = None
    if name != "forward" and not rotated:
        constexprs["tables"] = None
    if name != "forward" and not (rotated and documents):
        constexprs["positions_ptr"] = None
    signature = {
        argument: TYPES[argument] for argument in kernel.arg_names if argument not in constexprs
    }
    variant = ",documents" * documents + ",rope" * rotated
    return CompileCase(
        name=f"flash_attention_{name}/hd={head_size},{v_head_size}{variant}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        capability=capability,
        divisible_by_16=("T", *(name for name, kind in TYPES.items() if kind is TENSOR)),
        max_registers=tile.max_registers,
    )
