"""Muon at the shapes of option A: square, wide and tall matrices, split masters and whole ones."""

import triton.language as tl

from hamner.kernels.adamw import CONFIGS
from hamner.kernels.launch import CAPABILITIES
from hamner.kernels.muon import (
    PRODUCT_CONFIGS,
    apply_kernel,
    momentum_kernel,
    symmetric_product_kernel,
)
from tests.kernels.compile_gate import CompileCase

TABLE = {
    "addresses_ptr": "*i64",
    "numels_ptr": "*i64",
    "chunks_ptr": "*i32",
    "num_tensors": "i32",
    "clip_coef_ptr": "*fp32",
}
FACTORS = dict.fromkeys(("product_factor", "addend_factor", "identity_factor"), "fp32")
BF16 = {"GRAD": tl.bfloat16, "UPDATE": tl.bfloat16}


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for case in (
            _product("wide, gram", capability, "stride_xk", None),
            _product("tall, gram", capability, "stride_xm", None),
            _product("polynomial", capability, "stride_xk", "*bf16"),
            _elementwise("momentum", momentum_kernel, capability, ("beta", "one_minus_beta"), BF16),
            _elementwise(
                "split master", apply_kernel, capability, ("lr", "decay"),
                {"MASTER": tl.int16, "UPDATE": tl.bfloat16, "PARAM": tl.bfloat16},
            ),
            _elementwise(
                "fp32", apply_kernel, capability, ("lr", "decay"),
                {"MASTER": tl.float32, "UPDATE": tl.float32, "PARAM": None},
            ),
        )
    ]  # fmt: skip


def _product(name: str, capability: str, unit_stride: str, addend: str | None) -> CompileCase:
    config = PRODUCT_CONFIGS[capability]
    sizes = {"stride_xb", "stride_xm", "stride_xk", "M", "K"} - {unit_stride}
    return CompileCase(
        name=f"symmetric_product/{name}",
        kernel=symmetric_product_kernel,
        signature={
            "x_ptr": "*bf16",
            "out_ptr": "*bf16",
            **({} if addend is None else {"addend_ptr": addend}),
            **dict.fromkeys(sorted(sizes), "i32"),
            **FACTORS,
        },
        constexprs={
            unit_stride: 1,
            **({"addend_ptr": None} if addend is None else {}),
            "EVEN": True,
            "BLOCK": config.block,
            "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        capability=capability,
        divisible_by_16=tuple(sorted(sizes)),
    )


def _elementwise(name, kernel, capability, scalars, dtypes) -> CompileCase:
    config = CONFIGS[capability]
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={**TABLE, **dict.fromkeys(scalars, "fp32")},
        constexprs={**dtypes, "ALIGNED": True, "CHUNK": config.chunk, "BLOCK": config.block},
        num_warps=config.warps,
        num_stages=3,
        capability=capability,
    )
