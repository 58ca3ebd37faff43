"""Measure FlashAttention's launch configurations on the GPU at hand and print the best as a row.

    python -m bench.tune_flash_attention [--head-size 64] [--v-head-size 64] [--seq-len 1024]

The row goes into CONFIGS of kernels/flash_attention.py; tests/kernels/test_compile_gate.py then
says whether it fits the smallest card that uses it. Causal, bf16, 24,576 tokens, 16 query and 4
key/value heads; where both head sizes are one, packed and with RoPE's backward in attention's, as
a model runs it. Every candidate is compiled first, by all cores at once; then each is timed alone,
as a CUDA graph.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from bench.timing import graphed, quantiles, use_recordable_stream
from hamner.kernels.flash_attention import CONFIGS, Tile, launch_backward, launch_forward
from hamner.kernels.launch import capability

TOKENS, HEADS, KV_HEADS = 24_576, 16, 4
KERNELS = ("forward", "dq", "dk_dv")
OUTER_BLOCKS, INNER_BLOCKS, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
# By warps: no limit, or one at which 12 or 16 warps are resident on a multiprocessor.
MAX_REGISTERS = {4: (None, 168, 128), 8: (None, 128)}
SHOWN = 6


def candidates(kernel: str) -> Iterator[Tile]:
    """The function gives tiles worth a try: the outer block, which accumulates, is not the
    shorter."""
    for outer, inner, warps, stages in itertools.product(OUTER_BLOCKS, INNER_BLOCKS, WARPS, STAGES):
        if inner <= outer:
            block_m, block_n = (inner, outer) if kernel == "dk_dv" else (outer, inner)
            for max_registers in MAX_REGISTERS[warps]:
                yield Tile(
                    block_m,
                    block_n=block_n,
                    num_warps=warps,
                    num_stages=stages,
                    max_registers=max_registers,
                )


class Problem:
    """A problem is inputs of `batch_size` sequences, and both directions on them."""

    def __init__(self, head_size: int, v_head_size: int, seq_len: int, batch_size: int) -> None:
        def randn(heads: int, size: int) -> torch.Tensor:
            shape = (batch_size, seq_len, heads, size)
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        self.sizes = head_size, max(head_size, v_head_size)
        self.rope = ()
        if head_size == v_head_size:  # slices of a packed projection, as in a model
            heads = (HEADS, KV_HEADS, KV_HEADS)
            self.qkv, self.gradients = (
                randn(sum(heads), head_size).split(heads, dim=2) for _ in range(2)
            )
            angles = torch.rand(seq_len, head_size // 2, device="cuda")
            self.rope = angles.cos(), angles.sin(), None
        else:
            self.qkv = (
                randn(HEADS, head_size),
                randn(KV_HEADS, head_size),
                randn(KV_HEADS, self.sizes[1]),
            )
            self.gradients = [torch.empty_like(x) for x in self.qkv]
        self.d_out = randn(HEADS, self.sizes[1])
        self.masking = None, True, head_size**-0.5
        self.out, self.lse = launch_forward(*self.qkv, *self.masking)

    def forward(self) -> None:
        launch_forward(*self.qkv, *self.masking)

    def backward(self) -> None:
        launch_backward(
            self.d_out, *self.qkv, self.out, self.lse, *self.masking, *self.gradients, *self.rope
        )

    def with_tile(self, kernel: str, tile: Tile, use: Callable[[Callable[[], None]], float]):
        """The method gives the result of `use` on the direction `kernel` is part of, run with
        `tile`; infinite if it does not fit."""
        row = capability(torch.device("cuda"))
        table = CONFIGS[row]
        CONFIGS[row] = {**table, self.sizes: table[self.sizes]._replace(**{kernel: tile})}
        try:
            return use(self.forward if kernel == "forward" else self.backward)
        except OutOfResources:
            return float("inf")
        finally:
            CONFIGS[row] = table


def compile_tile(head_size: int, v_head_size: int, seq_len: int, job: tuple[str, Tile]) -> None:
    """The function leaves the kernel in Triton's cache on disk."""
    problem = Problem(head_size, v_head_size, seq_len, batch_size=1)
    problem.with_tile(*job, lambda run: run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--v-head-size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU found; launch tables are measured on the GPU they are for")
    shape = arguments.head_size, arguments.v_head_size, arguments.seq_len

    jobs = [(kernel, tile) for kernel in KERNELS for tile in candidates(kernel)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        list(pool.map(partial(compile_tile, *shape), jobs))

    use_recordable_stream()
    problem = Problem(*shape, batch_size=TOKENS // arguments.seq_len)
    best = {}
    # dq and dk_dv are one call: its time falls with either.
    for kernel in KERNELS:
        times = {
            tile: problem.with_tile(kernel, tile, lambda run: quantiles(graphed(run), rep=40)[0])
            for tile in candidates(kernel)
        }
        ranking = sorted(times, key=times.__getitem__)
        best[kernel] = ranking[0]
        call = "forward" if kernel == "forward" else "backward, both kernels"
        for tile in ranking[:SHOWN]:
            print(f"{kernel:8} {times[tile]:.3f} ms {call}  {tile}", flush=True)
    name = torch.cuda.get_device_name()
    print(f"# {name}, T {arguments.seq_len}, row {capability(torch.device('cuda'))}")
    print(f"    {problem.sizes}: Config(")
    for kernel, tile in best.items():
        print(f"        {kernel}=Tile({', '.join(map(str, tile))}),")
    print("    ),")


if __name__ == "__main__":
    main()
