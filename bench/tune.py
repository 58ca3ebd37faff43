"""Measure the launch tables of the kernels on the GPU at hand and print the best rows.

    python -m bench.tune [rms_norm swiglu rope cross_entropy adamw router_linear grouped_matmul
                          int8_matmul int8_quantize]

Shapes are those of option a (c for router_linear and grouped_matmul) at 24 x 1024, bf16. A row goes
into CONFIGS of the kernel's module; tests/kernels/test_compile_gate.py then says whether it fits
the smallest card that uses it. Every candidate is compiled first, by all cores at once; then each
is timed alone, as a CUDA graph. FlashAttention, whose table depends on head sizes, has
bench/tune_flash_attention.py.
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from bench.timing import graphed, quantiles, use_recordable_stream
from hamner.kernels.launch import capability

N, D, INTERMEDIATE, V, T = 24_576, 1024, 2816, 49_152, 1024
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 64
EXPERTS, TOP_K, MOE_D, MOE_I = 4, 2, 768, 1536
SHOWN = 4


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


class Tunable(NamedTuple):
    """A table is some fields of a module's CONFIGS, what values to try, and what to time."""

    module: str
    fields: tuple[str, ...]
    candidates: list[tuple]
    build: Callable[[object], Callable[[], object]]
    """the module -> the call to time"""


def grid(*axes: tuple) -> list[tuple]:
    return list(itertools.product(*axes))


def rms_norm_forward(m):
    x, residual, weight = randn(N, D), randn(N, D), torch.ones(D, device="cuda")
    return lambda: m.launch_rms_norm(x, residual, weight, 1e-5)


def rms_norm_backward(m):
    d_y, d_residual, x = randn(N, D), randn(N, D), randn(N, D)
    weight, rstd = torch.ones(D, device="cuda"), torch.ones(N, device="cuda")
    return lambda: m.launch_rms_norm_backward(
        d_y, d_residual=d_residual, x=x, weight=weight, rstd=rstd, y=d_y
    )


def swiglu_forward(m):
    gate_up = randn(N, 2 * INTERMEDIATE)
    return lambda: m.launch_swiglu(gate_up)


def swiglu_backward(m):
    d_h, gate_up = randn(N, INTERMEDIATE), randn(N, 2 * INTERMEDIATE)
    return lambda: m.launch_swiglu_backward(d_h, gate_up, h=d_h)


def rope(m):
    qkv = randn(N // T, T, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angles = torch.rand(T, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    return lambda: m.launch_packed_rotation(
        qkv, cos=cos, sin=sin, num_heads=HEADS, num_kv_heads=KV_HEADS, positions=None, in_place=True
    )


def cross_entropy(m):
    logits, losses = randn(4096, V), torch.empty(4096, device="cuda")
    targets = torch.randint(V, (4096,), device="cuda")
    return lambda: m.launch_cross_entropy_(
        logits, targets=targets, losses=losses, ignore_index=-100, z_loss=0.0, write_gradient=True
    )


def adamw(m):
    # Matrices of four layers, and an embedding.
    shapes = [(1536, D), (D, D), (2 * INTERMEDIATE, D), (D, INTERMEDIATE)] * 4 + [(V, D)]
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
    """The function gives one layer of option c, its tokens routed at random."""

    def __init__(self):
        from hamner.kernels.moe_routing import moe_route

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
    from hamner.kernels.int8_quantize import quantize_int8

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


_ROW_TILES = grid((1024, 2048, 4096, 8192), (2, 4, 8))


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


KERNELS: dict[str, dict[str, Tunable]] = {
    "rms_norm": {
        "forward": Tunable(
            "rms_norm", ("forward_tile", "forward_warps"), _ROW_TILES, rms_norm_forward
        ),
        "backward": Tunable(
            "rms_norm",
            ("backward_tile", "backward_warps", "backward_programs_per_sm", "backward_stages"),
            grid((1024, 2048, 4096, 8192), (2, 4, 8), (2, 4, 8), (1, 2, 3)),
            rms_norm_backward,
        ),
    },
    "swiglu": {
        "forward": Tunable(
            "swiglu",
            ("forward_block_m", "forward_block_i", "forward_warps"),
            grid((1, 2, 4, 8), (256, 512, 1024, 2048, 4096), (4, 8, 16)),
            swiglu_forward,
        ),
        "backward": Tunable(
            "swiglu",
            ("backward_block_m", "backward_block_i", "backward_warps"),
            grid((1, 2, 4), (256, 1024, 2048, 4096), (2, 4, 8, 16)),
            swiglu_backward,
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
        ),
    },
    "cross_entropy": {
        "rows": Tunable(
            "cross_entropy",
            ("block_v", "warps"),
            grid((2048, 4096, 8192, 16384), (4, 8, 16, 32)),
            cross_entropy,
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
        ),
    },
    "router_linear": {
        "forward": Tunable(
            "router_linear",
            ("forward_tile", "forward_warps"),
            grid((1024, 2048, 4096, 8192), (1, 2, 4, 8)),
            router_linear_forward,
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
        ),
    },
    "grouped_matmul": {
        "gate_up": Tunable(
            "grouped_matmul",
            ("gate_up",),
            matmul_tiles((3, 4), accumulators=2),
            moe_gate_up,
        ),
        "matmul": Tunable("grouped_matmul", ("matmul",), matmul_tiles((3, 4)), moe_matmul),
        "weight_grad": Tunable(
            "grouped_matmul", ("weight_grad",), matmul_tiles((3, 4, 6)), moe_weight_grad
        ),
    },
    "int8_matmul": {
        "rows": Tunable("int8_matmul", ("rows",), int8_tiles(1), partial(int8_matmul, False)),
        "grouped": Tunable("int8_matmul", ("grouped",), int8_tiles(2), partial(int8_matmul, True)),
    },
    "int8_quantize": {
        "rows": Tunable(
            "int8_quantize",
            ("tile", "warps"),
            grid((1024, 2048, 4096, 8192), (2, 4, 8)),
            partial(quantise, False),
        ),
        "columns": Tunable(
            "int8_quantize",
            ("columns", "column_warps"),
            grid((32, 64, 128), (4, 8, 16)),
            partial(quantise, True),
        ),
    },
}


def with_row(tunable: Tunable, values: tuple, use: Callable[[Callable], float]) -> float:
    """The method gives the result of `use` on the call with these values in the table; infinite if
    they do not fit the GPU."""
    module = importlib.import_module(f"hamner.kernels.{tunable.module}")
    row = capability(torch.device("cuda"))
    config = module.CONFIGS[row]
    typed = [
        type(getattr(config, field))(*value) if isinstance(value, tuple) else value
        for field, value in zip(tunable.fields, values, strict=True)
    ]
    module.CONFIGS[row] = config._replace(**dict(zip(tunable.fields, typed, strict=True)))
    try:
        return use(tunable.build(module))
    except OutOfResources:
        return float("inf")
    finally:
        module.CONFIGS[row] = config


def compile_row(job: tuple[str, str, tuple]) -> None:
    """The function leaves the kernel in Triton's cache on disk."""
    kernel, direction, values = job
    with_row(KERNELS[kernel][direction], values, lambda call: call())


def jobs(kernels: list[str]) -> Iterator[tuple[str, str, tuple]]:
    for kernel in kernels:
        for direction, tunable in KERNELS[kernel].items():
            for values in tunable.candidates:
                yield kernel, direction, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(KERNELS)}; default all")
    kernels = parser.parse_args().kernels or list(KERNELS)
    for kernel in kernels:
        if kernel not in KERNELS:
            parser.error(f"{kernel} is not one of {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU found; launch tables are measured on the GPU they are for")

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        list(pool.map(compile_row, jobs(kernels)))

    use_recordable_stream()
    print(f"# {torch.cuda.get_device_name()}, row {capability(torch.device('cuda'))}")
    for kernel in kernels:
        for direction, tunable in KERNELS[kernel].items():
            times = {
                values: with_row(tunable, values, lambda call: quantiles(graphed(call), rep=30)[0])
                for values in tunable.candidates
            }
            for values in sorted(times, key=times.__getitem__)[:SHOWN]:
                row = ", ".join(f"{f}={v}" for f, v in zip(tunable.fields, values, strict=True))
                print(f"{kernel} {direction}: {times[values] * 1e3:8.1f} us  {row}", flush=True)


if __name__ == "__main__":
    main()
