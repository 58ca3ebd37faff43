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
from tests.kernels.compile_cases.adamw import TABLE
from tests.kernels.compile_gate import CompileCase

FACTORS = dict.fromkeys(("product_factor", "addend_factor", "identity_factor"), "fp32")
BF16 = {"GRAD": tl.bfloat16, "UPDATE": tl.bfloat16}


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for case in (
            _product("wide, gram", capability, "stride_k", {"factors_ptr": "*fp32"}),
            _product("tall, gram", capability, "stride_m", {"factors_ptr": "*fp32"}),
            _product(
                "polynomial", capability, "stride_k",
                {"x_ptr": "*fp16", "addend_ptr": "*fp16"},
            ),
            _product(
                "transform", capability, "stride_k",
                {
                    "x_ptr": "*fp16", "addend_ptr": "*fp16", "out_ptr": "*bf16",
                    "factors_ptr": "*fp32",
                },
            ),
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


def _product(name: str, capability: str, unit_stride: str, pointers: dict[str, str]) -> CompileCase:
    config = PRODUCT_CONFIGS[capability]
    sizes = {"stride_b", "stride_m", "stride_k", "M", "K"} - {unit_stride}
    optional = {"addend_ptr": None, "factors_ptr": None}
    pointers = {"x_ptr": "*bf16", "out_ptr": "*fp16", **optional, **pointers}
    return CompileCase(
        name=f"symmetric_product/{name}",
        kernel=symmetric_product_kernel,
        signature={**pointers, **dict.fromkeys(sorted(sizes), "i32"), **FACTORS},
        constexprs={
            unit_stride: 1,
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
        signature={**TABLE, "clip_coef_ptr": "*fp32", **dict.fromkeys(scalars, "fp32")},
        constexprs={**dtypes, "ALIGNED": True, "CHUNK": config.chunk, "BLOCK": config.block},
        num_warps=config.warps,
        capability=capability,
    )
