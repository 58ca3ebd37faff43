"""FlashAttention at head sizes 64 and 128, and 64 with values of 128 (differential attention).

Option A's heads, T a multiple of the tiles, causal, with and without documents, backward also with
RoPE's folded in. The names of strides end in the axis: those of heads and tokens are multiples of
16 elements at these sizes.
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
TYPES = {
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "document_start_ptr": "*i32",
    "document_end_ptr": "*i32",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "positions_ptr": "*i32",
    "scale": "fp32",
    "scale_log2": "fp32",
    "T": "i32",
    "H": "i32",
    "KV": "i32",
    "num_positions": "i32",
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
        "HAS_DOCUMENTS": documents,
        "EVEN_T": True,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": v_head_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": head_size,
        "BLOCK_DV": v_head_size,
    }
    if not documents:
        constexprs |= {"document_start_ptr": None, "document_end_ptr": None}
    if name != "forward" and not rotated:
        constexprs |= {"cos_ptr": None, "sin_ptr": None}
    if name != "forward" and not (rotated and documents):
        constexprs |= {"positions_ptr": None}
    strides = [argument for argument in kernel.arg_names if argument.startswith("stride_")]
    signature = {
        argument: TYPES.get(argument, "i32" if argument in strides else "*bf16")
        for argument in kernel.arg_names
        if argument not in constexprs
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
        divisible_by_16=("T", *strides),
        max_registers=tile.max_registers,
    )
