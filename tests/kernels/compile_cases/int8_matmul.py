"""The int8 matmul in both modes, and the quantisers, at shapes of option a."""

from hamner.kernels import int8_error, int8_quantize
from hamner.kernels.int8_matmul import CONFIGS, int8_matmul_kernel
from hamner.kernels.int8_quantize import GROUP, MAX_ROW
from hamner.kernels.launch import CAPABILITIES, tile_shape
from tests.kernels.compile_gate import CompileCase

WIDTH = 1024


def cases() -> list[CompileCase]:
    return [
        case
        for capability in CAPABILITIES
        for case in (
            _matmul("rows", capability, even=True),
            _matmul("rows", capability, even=False),
            _matmul("grouped", capability, even=True),
            _matmul("grouped", capability, even=False),
            _rows("row", capability, length=WIDTH, width=WIDTH),
            _rows("longest row", capability, length=MAX_ROW, width=MAX_ROW),
            _rows("groups of a row", capability, length=WIDTH, width=GROUP.value),
            _columns("columns", capability, maxima="*i32"),
            _columns("groups of columns", capability, maxima=None),
            _maxima(capability),
            _error("rows", capability, by_rows=True),
            _error("groups of rows", capability, by_rows=True, grouped=True),
            _error("columns", capability, by_rows=False),
            _error("groups of columns", capability, by_rows=False, grouped=True),
        )
    ]


def _matmul(mode: str, capability: str, *, even: bool) -> CompileCase:
    tile = getattr(CONFIGS[capability], mode)
    grouped = mode == "grouped"
    return CompileCase(
        name=f"int8_matmul/{mode}{'' if even else '/tail'}",
        kernel=int8_matmul_kernel,
        signature={
            "a_ptr": "*i8",
            "a_scales_ptr": "*fp32",
            "b_ptr": "*i8",
            "b_scales_ptr": "*fp32",
            "out_ptr": "*bf16",
            **dict.fromkeys("MNK", "i32"),
        },
        constexprs={
            "GROUP_STEPS": GROUP.value // tile.BLOCK_K if grouped else None,
            "EVEN_K": even,
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        capability=capability,
        divisible_by_16=("M", "N", "K"),
        fp_fusion=False,
        disassembles=True,
    )


def _rows(name: str, capability: str, *, length: int, width: int) -> CompileCase:
    config = int8_quantize.CONFIGS[capability]
    block_m, block_d, warps = tile_shape(config.tile, config.warps, width)
    return CompileCase(
        name=f"quantize_int8/{name}",
        kernel=int8_quantize.quantize_rows_kernel,
        signature={"x_ptr": "*bf16", "values_ptr": "*i8", "scales_ptr": "*fp32", "N": "i32"},
        constexprs={"D": length, "WIDTH": width, "BLOCK_M": block_m, "BLOCK_D": block_d},
        num_warps=min(warps, 32),
        capability=capability,
        divisible_by_16=("N",),
    )


def _columns(name: str, capability: str, *, maxima: str | None) -> CompileCase:
    config = int8_quantize.CONFIGS[capability]
    return CompileCase(
        name=f"quantize_int8/{name}",
        kernel=int8_quantize.quantize_columns_kernel,
        signature={
            "x_ptr": "*bf16",
            "maxima_ptr": maxima,
            "values_ptr": "*i8",
            "scales_ptr": "*fp32",
            "N": "i32",
        },
        constexprs={"D": WIDTH, "BLOCK_D": config.columns},
        num_warps=config.column_warps,
        capability=capability,
        divisible_by_16=("N",),
    )


def _maxima(capability: str) -> CompileCase:
    config = int8_quantize.CONFIGS[capability]
    return CompileCase(
        name="quantize_int8/maxima of columns",
        kernel=int8_quantize.column_maxima_kernel,
        signature={"x_ptr": "*bf16", "maxima_ptr": "*i32", "N": "i32"},
        constexprs={"D": WIDTH, "BLOCK_D": config.columns},
        num_warps=config.column_warps,
        capability=capability,
        divisible_by_16=("N",),
    )


def _error(name: str, capability: str, *, by_rows: bool, grouped: bool = False) -> CompileCase:
    elements = int8_error.ROW_ELEMENTS if by_rows else int8_error.COLUMN_ELEMENTS
    unit, other = ("element_stride", "line_stride")[:: 1 if by_rows else -1]
    return CompileCase(
        name=f"quantization_error/{name}",
        kernel=int8_error.quantization_error_kernel,
        signature={
            "x_ptr": "*bf16",
            "sums_ptr": "*fp32",
            "num_lines": "i32",
            "length": "i32",
            other: "i32",
        },
        constexprs={
            unit: 1,
            "GROUPED": grouped,
            "BLOCK_L": int8_error.BLOCK_ROWS if by_rows else int8_error.BLOCK_COLUMNS,
            "BLOCK_E": GROUP.value if grouped else elements,
        },
        num_warps=int8_error.NUM_WARPS,
        capability=capability,
        divisible_by_16=("num_lines", "length", other),
    )
