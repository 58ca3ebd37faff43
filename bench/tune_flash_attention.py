"""Measure FlashAttention's launch configurations on the GPU at hand and print the best as a row.

    python -m bench.tune_flash_attention [--head-size 64] [--v-head-size 64] [--seq-len 1024]

The row goes into CONFIGS of kernels/flash_attention.py; tests/kernels/test_compile_gate.py then
says whether it fits the smallest card that uses it. Causal, bf16, 24,576 tokens, 16 query and 4
key/value heads.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
from triton.runtime.errors import OutOfResources

from hamner.kernels.flash_attention import CONFIGS, Tile, launch_backward, launch_forward
from hamner.kernels.launch import capability

TOKENS, HEADS, KV_HEADS = 24_576, 16, 4
OUTER_BLOCKS, INNER_BLOCKS, WARPS, STAGES = (64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)
SHOWN = 5


def candidates(kernel: str) -> Iterator[Tile]:
    """Tiles worth a try: the outer block, which accumulates, is not the shorter."""
    for outer, inner, warps, stages in itertools.product(OUTER_BLOCKS, INNER_BLOCKS, WARPS, STAGES):
        if inner <= outer:
            block_m, block_n = (inner, outer) if kernel == "dk_dv" else (outer, inner)
            yield Tile(block_m, block_n, warps, stages)


def time_tile(kernel: str, tile: Tile, sizes: tuple[int, int], run: Callable[[], None]) -> float:
    """Median milliseconds of `run` with `tile` for `kernel`; infinite if it does not fit."""
    row = capability(torch.device("cuda"))
    table = CONFIGS[row]
    changed = {**table, sizes: table[sizes]._replace(**{kernel: tile})}
    CONFIGS[row] = changed
    try:
        return triton.testing.do_bench(run, quantiles=[0.5])
    except OutOfResources:
        return float("inf")
    finally:
        CONFIGS[row] = table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--v-head-size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    arguments = parser.parse_args()
    head_size, seq_len = arguments.head_size, arguments.seq_len
    sizes = head_size, max(head_size, arguments.v_head_size)

    def randn(heads: int, size: int) -> torch.Tensor:
        shape = (TOKENS // seq_len, seq_len, heads, size)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q, k, v = randn(HEADS, sizes[0]), randn(KV_HEADS, sizes[0]), randn(KV_HEADS, sizes[1])
    d_out = randn(HEADS, sizes[1])
    masking = None, None, True, head_size**-0.5
    out, lse = launch_forward(q, k, v, *masking)
    gradients = [torch.empty_like(x) for x in (q, k, v)]

    def forward() -> None:
        launch_forward(q, k, v, *masking)

    def backward() -> None:
        launch_backward(d_out, q, k, v, out, lse, *masking, *gradients)

    best = {}
    # dq and dk_dv are one call: its time falls with either.
    for kernel, run in (("forward", forward), ("dq", backward), ("dk_dv", backward)):
        times = {tile: time_tile(kernel, tile, sizes, run) for tile in candidates(kernel)}
        ranking = sorted(times, key=times.__getitem__)
        best[kernel] = ranking[0]
        call = "forward" if kernel == "forward" else "backward, both kernels"
        for tile in ranking[:SHOWN]:
            print(f"{kernel:8} {times[tile]:.3f} ms {call}  {tile}", flush=True)
    name = torch.cuda.get_device_name()
    print(f"# {name}, T {seq_len}, row {capability(torch.device('cuda'))}")
    print(f"    {sizes}: Config(")
    for kernel, tile in best.items():
        print(f"        {kernel}=Tile({', '.join(map(str, tile))}),")
    print("    ),")


if __name__ == "__main__":
    main()
