"""Measure the launch tables of the kernels on the GPU at hand and print the best rows.

    python -m bench.tune [rms_norm swiglu rope qk_norm cross_entropy adamw router_linear
        grouped_matmul int8_matmul int8_quantize] [--as-capability 8.6] [--output FILE]

Shapes are those of option a (c for router_linear and grouped_matmul) at 24 x 1024, bf16. A row goes
into CONFIGS of the kernel's module; tests/kernels/test_compile_gate.py then says whether it fits
the smallest card that uses it. FlashAttention, whose table depends on head sizes, has
bench/tune_flash_attention.py; how both measure is in bench/tuning.py.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from bench.tuning import (
    Subject,
    add_arguments,
    compile_ahead,
    conclude,
    mma_matmul_subject,
    rank,
    tuning,
)
from hamner.kernels.int8_quantize import empty_int8, quantize_int8
from hamner.kernels.launch import capability
from hamner.kernels.moe_routing import moe_route
from hamner.plan import costs
from hamner.plan.costs import Cost

N, D, INTERMEDIATE, V, T = 24_576, 1024, 2816, 49_152, 1024
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 64
EXPERTS, TOP_K, MOE_D, MOE_I = 4, 2, 768, 1536
LOSS_ROWS = 4096


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


class Tunable(NamedTuple):
    """A table is some fields of a module's CONFIGS, what values to try, and what to time."""

    module: str
    fields: tuple[str, ...]
    candidates: list[tuple]
    build: Callable[[object], Callable[[], object]]
    """the module -> the call to time"""
    cost: Cost


def grid(*axes: tuple) -> list[tuple]:
    return list(itertools.product(*axes))


def rms_norm_forward(m):
    x, residual, weight = randn(N, D), randn(N, D), torch.ones(D, device="cuda")
    return lambda: m.launch_rms_norm(x, residual, weight, 1e-5)


def rms_norm_backward(m, *, quantises: bool = False):
    """The table has one row for both, so that both sum up alike."""
    d_y, d_residual, x = randn(N, D), randn(N, D), randn(N, D)
    weight, rstd = torch.ones(D, device="cuda"), torch.ones(N, device="cuda")
    how = {"y": d_y, "quantised": empty_int8(x, x.shape, grouped=False) if quantises else None}
    return lambda: m.launch_rms_norm_backward(
        d_y, d_residual=d_residual, x=x, weight=weight, rstd=rstd, **how
    )


def swiglu_forward(m):
    gate_up = randn(N, 2 * INTERMEDIATE)
    return lambda: m.launch_swiglu(gate_up)


def swiglu_backward(m, *, quantises: bool = False):
    d_h, gate_up = randn(N, INTERMEDIATE), randn(N, 2 * INTERMEDIATE)
    quantised = empty_int8(gate_up, gate_up.shape, grouped=True) if quantises else None
    return lambda: m.launch_swiglu_backward(d_h, gate_up, h=d_h, quantised=quantised)


def rms_norm_int8(m):
    """As forward keeps y for nobody: the table has one row for both, so that both sum up alike."""
    x, residual, weight = randn(N, D), randn(N, D), torch.ones(D, device="cuda")
    quantised = empty_int8(x, x.shape, grouped=False)
    return lambda: m.launch_rms_norm(x, residual, weight, 1e-5, quantised=quantised, writes_y=False)


def swiglu_int8_forward(m):
    gate_up = randn(N, 2 * INTERMEDIATE)
    quantised = empty_int8(gate_up, (N, INTERMEDIATE), grouped=True)
    return lambda: m.launch_swiglu(gate_up, quantised=quantised, writes_h=False)


def rope(m):
    qkv = randn(N // T, T, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angles = torch.rand(T, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    return lambda: m.launch_packed_rotation(
        qkv, cos=cos, sin=sin, num_heads=HEADS, num_kv_heads=KV_HEADS, positions=None, in_place=True
    )


def qk_norm_inputs():
    qkv, angles = randn(N // T, T, (HEADS + 2 * KV_HEADS) * HEAD_DIM), torch.rand(T, HEAD_DIM // 2)
    settings = {
        "q_weight": torch.ones(HEAD_DIM, device="cuda"),
        "k_weight": torch.ones(HEAD_DIM, device="cuda"),
        "cos": angles.cos().cuda(),
        "sin": angles.sin().cuda(),
        "positions": None,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "eps": 1e-5,
    }
    return qkv, settings


def qk_norm_forward(m):
    """As a layer runs it, v left where it is."""
    qkv, settings = qk_norm_inputs()
    return lambda: torch.ops.hamner.qk_norm_rope(qkv, **settings, with_v=False)


def qk_norm_backward(m):
    qkv, settings = qk_norm_inputs()
    d_qkv = randn(*qkv.shape)
    return lambda: torch.ops.hamner.qk_norm_rope_backward_(d_qkv, qkv, **settings)


def cross_entropy(m):
    logits, losses = randn(LOSS_ROWS, V), torch.empty(LOSS_ROWS, device="cuda")
    targets = torch.randint(V, (LOSS_ROWS,), device="cuda")
    return lambda: m.launch_cross_entropy_(
        logits, targets=targets, losses=losses, ignore_index=-100, z_loss=0.0, write_gradient=True
    )


# Matrices of four layers, and an embedding.
UPDATED = [(1536, D), (D, D), (2 * INTERMEDIATE, D), (D, INTERMEDIATE)] * 4 + [(V, D)]


def adamw(m):
    shapes = UPDATED
    params, remainders = zip(
        *(m.split_master(torch.randn(shape, device="cuda")) for shape in shapes), strict=True
    )
    states = [[torch.zeros(shape, device="cuda") for shape in shapes] for _ in range(2)]
    grads = [randn(*shape) for shape in shapes]
    scalars = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    clip_coef = torch.ones((), device="cuda")
    return lambda: m.adamw_(
        params, remainders, grads, *states, lr=1e-4, step=9, clip_coef=clip_coef, **scalars
    )


def router_linear_forward(m):
    x, weight = randn(N, MOE_D), randn(EXPERTS, MOE_D)
    return lambda: m.launch_router_linear(x, weight)


def router_linear_backward(m):
    d_logits, x = torch.randn(N, EXPERTS, device="cuda"), randn(N, MOE_D)
    weight = randn(EXPERTS, MOE_D)
    return lambda: m.launch_router_linear_backward(d_logits, x, weight)


class MoeProblem:
    """The problem is one layer of option c, its tokens routed at random."""

    def __init__(self):
        torch.manual_seed(0)
        self.routing = moe_route(torch.randn(N, EXPERTS, device="cuda"), TOP_K)
        self.order, self.offsets = self.routing.order, self.routing.offsets
        self.x = randn(N, MOE_D)
        self.gate_up_weight = randn(EXPERTS, 2 * MOE_I, MOE_D)
        self.down_weight = randn(EXPERTS, MOE_D, MOE_I)
        self.hidden = randn(N * TOP_K, MOE_I)
        self.gate_up = randn(N * TOP_K, 2 * MOE_I)


def moe_gate_up(m):
    p = MoeProblem()
    weights, pairs = p.routing.weights.detach(), m.Pairs(p.order, p.offsets, TOP_K)
    return lambda: m.launch_gate_up(p.x, weights, pairs, p.gate_up_weight)


def moe_matmul(m):
    p = MoeProblem()
    pairs = m.Pairs(p.order, p.offsets, TOP_K)

    def run():
        m.launch_grouped_matmul(p.hidden, p.down_weight, pairs, gather=False, transposed=True)
        m.launch_grouped_matmul(p.x, p.down_weight, pairs, gather=True, transposed=False)
        m.launch_grouped_matmul(p.gate_up, p.gate_up_weight, pairs, gather=False, transposed=False)

    return run


def moe_weight_grad(m):
    p = MoeProblem()
    pairs = m.Pairs(p.order, p.offsets, TOP_K)

    def run():
        m.launch_weight_grad(p.x, p.hidden, pairs, gather_d_out=True)
        m.launch_weight_grad(p.gate_up, p.x, pairs, gather_d_out=False)

    return run


def int8_matmul(grouped: bool, m):
    """The three matmuls of option a's widest layer, of which the weight's gradient is grouped."""
    x, d_out, weight = randn(N, D), randn(N, 2 * INTERMEDIATE), randn(2 * INTERMEDIATE, D)
    pairs = [
        tuple(
            quantize_int8(operand, transposed=transposed, grouped=grouped)
            for operand, transposed in pair
        )
        for pair in (
            ((x, False), (weight, False)),
            ((d_out, False), (weight, True)),
            ((d_out, True), (x, True)),
        )
    ]

    def run():
        for a, b in pairs:
            m.int8_matmul(a, b)

    return run


def quantise(transposed: bool, m):
    x, d_out = randn(N, D), randn(N, 2 * INTERMEDIATE)

    def run():
        m.quantize_int8(x, transposed=transposed, grouped=transposed)
        m.quantize_int8(d_out, transposed=transposed, grouped=transposed)

    return run


def grouped(matrices: int) -> Cost:
    """The function gives the work of all routed rows with so many matrices of width x inner."""
    return Cost(matrices * costs.matmul(N * TOP_K, MOE_D, MOE_I).flops)


_ROW_TILES = grid((1024, 2048, 4096, 8192), (2, 4, 8))
# Of 256 columns: 4 to 32 elements a thread.
_INT8_TILES = [
    row for row in grid((2, 4, 8, 16, 32), (1, 2, 4, 8, 16)) if 4 <= 8 * row[0] / row[1] <= 32
]


def matmul_tiles(stages: tuple[int, ...], accumulators: int = 1) -> list[tuple]:
    """The function gives tiles whose fp32 accumulators take 32 to 128 registers of a thread."""
    return [
        (tile,)
        for tile in grid((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), stages)
        if 32 <= accumulators * tile[0] * tile[1] / (32 * tile[3]) <= 128
    ]


def int8_tiles(registers: int) -> list[tuple]:
    """The function gives tiles of results that take this many registers each, 64 to 128 of a
    thread in all."""
    return [
        (tile,)
        for tile in grid((64, 128, 256), (128, 256), (64, 128), (4, 8), (3, 4, 5))
        if 64 <= registers * tile[0] * tile[1] / (32 * tile[3]) <= 128
    ]


_NORM_BACKWARD = (
    ("backward_tile", "backward_warps", "backward_programs_per_sm", "backward_stages"),
    grid((1024, 2048, 4096, 8192), (2, 4, 8), (2, 4, 8), (1, 2, 3)),
)

KERNELS: dict[str, dict[str, Tunable]] = {
    "rms_norm": {
        "forward": Tunable(
            "rms_norm",
            ("forward_tile", "forward_warps"),
            _ROW_TILES,
            rms_norm_forward,
            costs.rms_norm(N * D, adds_residual=True),
        ),
        "backward": Tunable(
            "rms_norm",
            *_NORM_BACKWARD,
            rms_norm_backward,
            costs.rms_norm(N * D, adds_residual=True, backward=True, recompute=True),
        ),
        "int8": Tunable(
            "rms_norm",
            ("forward_tile", "forward_warps"),
            _ROW_TILES,
            rms_norm_int8,
            Cost(bytes=7 * N * D),  # x, residual and their sum, and a byte an element of y
        ),
        "int8 backward": Tunable(
            "rms_norm",
            *_NORM_BACKWARD,
            functools.partial(rms_norm_backward, quantises=True),
            costs.rms_norm(N * D, adds_residual=True, backward=True, recompute=True)
            + Cost(bytes=N * D),
        ),
    },
    "swiglu": {
        "forward": Tunable(
            "swiglu",
            ("forward_block_m", "forward_block_i", "forward_warps"),
            grid((1, 2, 4, 8), (256, 512, 1024, 2048, 4096), (4, 8, 16)),
            swiglu_forward,
            costs.swiglu(N * INTERMEDIATE),
        ),
        "backward": Tunable(
            "swiglu",
            ("backward_block_m", "backward_block_i", "backward_warps"),
            grid((1, 2, 4), (256, 1024, 2048, 4096), (2, 4, 8, 16)),
            swiglu_backward,
            costs.swiglu(N * INTERMEDIATE, backward=True, recompute=True),
        ),
        "int8 forward": Tunable(
            "swiglu",
            ("int8_forward_block_m", "int8_forward_warps"),
            _INT8_TILES,
            swiglu_int8_forward,
            Cost(bytes=5 * N * INTERMEDIATE),  # gate and up, and a byte an element of h
        ),
        "int8 backward": Tunable(
            "swiglu",
            ("int8_backward_block_m", "int8_backward_warps"),
            _INT8_TILES,
            functools.partial(swiglu_backward, quantises=True),
            costs.swiglu(N * INTERMEDIATE, backward=True, recompute=True)
            + Cost(bytes=2 * N * INTERMEDIATE),
        ),
    },
    "rope": {
        "packed": Tunable(
            "rope",
            ("block_m", "block_h", "warps"),
            [
                tile
                for tile in grid((1, 2, 4, 8, 16), (4, 8, 16, 32), (2, 4, 8))
                if tile[0] * tile[1] <= 128
            ],
            rope,
            costs.rope(N * (HEADS + KV_HEADS) * HEAD_DIM),
        ),
    },
    "qk_norm": {
        "forward": Tunable(
            "qk_norm",
            ("forward_tile", "forward_warps"),
            grid((256, 512, 1024, 2048), (1, 2, 4, 8)),
            qk_norm_forward,
            costs.qk_norm_rope(N * (HEADS + KV_HEADS) * HEAD_DIM),
        ),
        "backward": Tunable(
            "qk_norm",
            ("backward_tile", "backward_warps", "backward_programs_per_sm"),
            grid((256, 512, 1024, 2048), (1, 2, 4, 8), (2, 4, 8, 16)),
            qk_norm_backward,
            costs.qk_norm_rope(N * (HEADS + KV_HEADS) * HEAD_DIM, backward=True),
        ),
    },
    "cross_entropy": {
        "rows": Tunable(
            "cross_entropy",
            ("block_v", "warps"),
            grid((2048, 4096, 8192, 16384), (4, 8, 16, 32)),
            cross_entropy,
            Cost(bytes=costs.linear_cross_entropy(LOSS_ROWS, D, V).bytes),
        ),
    },
    "adamw": {
        "update": Tunable(
            "adamw",
            ("chunk", "block", "warps"),
            [
                row
                for row in grid((1024, 2048, 4096, 8192), (512, 1024, 2048), (2, 4, 8))
                if row[0] >= row[1] and 4 <= row[1] // (32 * row[2]) <= 16
            ],
            adamw,
            costs.adamw(sum(m * n for m, n in UPDATED), split_master=True),
        ),
    },
    "router_linear": {
        "forward": Tunable(
            "router_linear",
            ("forward_tile", "forward_warps"),
            grid((1024, 2048, 4096, 8192), (1, 2, 4, 8)),
            router_linear_forward,
            Cost(bytes=costs.router_linear(N, MOE_D, EXPERTS).bytes),
        ),
        "backward": Tunable(
            "router_linear",
            ("backward_block_m", "backward_block_d", "backward_warps"),
            [
                tile
                for tile in grid((32, 64, 128, 256), (64, 128, 256), (2, 4, 8, 16))
                if 8 <= tile[0] * tile[1] / (32 * tile[2]) <= 64
            ],
            router_linear_backward,
            Cost(bytes=costs.router_linear(N, MOE_D, EXPERTS, backward=True).bytes),
        ),
    },
    "grouped_matmul": {
        "gate_up": Tunable(
            "grouped_matmul",
            ("gate_up",),
            matmul_tiles((3, 4), accumulators=2),
            moe_gate_up,
            grouped(2),
        ),
        "matmul": Tunable(
            "grouped_matmul", ("matmul",), matmul_tiles((3, 4)), moe_matmul, grouped(4)
        ),
        "weight_grad": Tunable(
            "grouped_matmul",
            ("weight_grad",),
            matmul_tiles((3, 4, 6)),
            moe_weight_grad,
            grouped(3),
        ),
    },
    "int8_matmul": {
        mode: Tunable(
            "int8_matmul",
            (mode,),
            int8_tiles(registers),
            functools.partial(int8_matmul, mode == "grouped"),
            Cost(3 * costs.matmul(N, D, 2 * INTERMEDIATE).flops),
        )
        for mode, registers in (("rows", 1), ("grouped", 2))
    },
    "int8_quantize": {
        "rows": Tunable(
            "int8_quantize",
            ("tile", "warps"),
            grid((1024, 2048, 4096, 8192), (2, 4, 8)),
            functools.partial(quantise, False),
            costs.quantize_int8(N * (D + 2 * INTERMEDIATE)),
        ),
        "columns": Tunable(
            "int8_quantize",
            ("columns", "column_warps"),
            grid((32, 64, 128), (4, 8, 16)),
            functools.partial(quantise, True),
            costs.quantize_int8(N * (D + 2 * INTERMEDIATE)),
        ),
    },
}


def row_of(tunable: Tunable) -> tuple:
    """The function gives the table's values for the GPU at hand."""
    config = configs(tunable)[capability(torch.device("cuda"))]
    return tuple(
        tuple(value) if isinstance(value, tuple) else value
        for value in (getattr(config, field) for field in tunable.fields)
    )


def configs(tunable: Tunable) -> dict:
    """The function gives the launch table of a module."""
    return importlib.import_module(f"hamner.kernels.{tunable.module}").CONFIGS


@contextlib.contextmanager
def with_row(tunable: Tunable, values: tuple) -> Iterator[None]:
    """While it is open, these values are in the table's row of the GPU at hand."""
    table, row = configs(tunable), capability(torch.device("cuda"))
    config = table[row]
    typed = [
        type(getattr(config, field))(*value) if isinstance(value, tuple) else value
        for field, value in zip(tunable.fields, values, strict=True)
    ]
    table[row] = config._replace(**dict(zip(tunable.fields, typed, strict=True)))
    try:
        yield
    finally:
        table[row] = config


def subjects(kernels: tuple[str, ...]) -> list[Subject]:
    """The function gives what these kernels' tables decide, after the matmul they are held to."""
    found = [mma_matmul_subject()]
    for kernel in kernels:
        for direction, tunable in KERNELS[kernel].items():
            module = importlib.import_module(f"hamner.kernels.{tunable.module}")
            found.append(
                Subject(
                    f"{kernel} {direction}",
                    tunable.candidates,
                    row_of(tunable),
                    build=functools.partial(tunable.build, module),
                    install=functools.partial(with_row, tunable),
                    cost=tunable.cost,
                )
            )
    return found


def main(argv: list[str] | None = None) -> None:
    """The command measures, and prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(KERNELS)}; default all")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    kernels = tuple(arguments.kernels or KERNELS)
    for kernel in kernels:
        if kernel not in KERNELS:
            parser.error(f"{kernel} is not one of {', '.join(KERNELS)}")
    with tuning(parser, arguments):
        misfits = compile_ahead(functools.partial(subjects, kernels), arguments.as_capability)
        rankings = [rank(subject, misfits) for subject in subjects(kernels)]
        conclude(rankings, capability(torch.device("cuda")), arguments.output)


if __name__ == "__main__":
    main()
