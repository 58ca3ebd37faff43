"""Measure FlashAttention's launch configurations on the GPU at hand and print the best as a row.

    python -m bench.tune_flash_attention [--head-size 64] [--v-head-size 64] [--seq-len 1024]
        [--as-capability 8.6] [--output FILE]

The row goes into CONFIGS of kernels/flash_attention.py; tests/kernels/test_compile_gate.py then
says whether it fits the smallest card that uses it. Causal, bf16, 24,576 tokens, 16 query and 4
key/value heads; where both head sizes are one, packed and with RoPE's backward in attention's, as
a model runs it. The two kernels of backward are timed as one call, which becomes faster with
either. How it is measured is in bench/tuning.py.
"""

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial

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
from hamner.kernels.flash_attention import CONFIGS, Tile, launch_backward, launch_forward
from hamner.kernels.launch import capability
from hamner.plan import costs
from hamner.plan.costs import Cost

TOKENS, HEADS, KV_HEADS = 24_576, 16, 4
KERNELS = ("forward", "dq", "dk_dv")
OUTER_BLOCKS, INNER_BLOCKS, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
# By warps: no limit, or one at which 12 or 16 warps are resident on a multiprocessor.
MAX_REGISTERS = {4: (None, 168, 128), 8: (None, 128)}


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


@contextlib.contextmanager
def with_tiles(sizes: tuple[int, int], tiles: dict[str, Tile]) -> Iterator[None]:
    """While it is open, these kernels have these tiles in the table's row of the GPU at hand."""
    row = capability(torch.device("cuda"))
    table = CONFIGS[row]
    CONFIGS[row] = {**table, sizes: table[sizes]._replace(**tiles)}
    try:
        yield
    finally:
        CONFIGS[row] = table


def subject(
    kernels: tuple[str, ...], choices: list[tuple[Tile, ...]], shape: tuple[int, int, int]
) -> Subject:
    """The function gives the choice of the tiles of one kernel, or of several in one call.

    Args:
        kernels: of one direction.
        choices: a tile of each.
        shape: head size, head size of the values, T.
    """
    head_size, v_head_size, seq_len = shape
    sizes = head_size, max(head_size, v_head_size)
    is_backward = kernels != ("forward",)

    def build() -> Callable[[], None]:
        problem = Problem(*shape, batch_size=TOKENS // seq_len)
        return problem.backward if is_backward else problem.forward

    def install(values: tuple) -> contextlib.AbstractContextManager:
        tiles = (Tile(*tile) for tile in values)
        return with_tiles(sizes, dict(zip(kernels, tiles, strict=True)))

    config = CONFIGS[capability(torch.device("cuda"))][sizes]
    return Subject(
        f"attention {' and '.join(kernels)}",
        [tuple(map(tuple, choice)) for choice in choices],
        tuple(tuple(getattr(config, kernel)) for kernel in kernels),
        build=build,
        install=install,
        cost=work(shape, backward=is_backward),
    )


def work(shape: tuple[int, int, int], *, backward: bool) -> Cost:
    """The function gives the work of one direction; `shape` as in `subject`."""
    head_size, v_head_size, seq_len = shape
    return costs.attention(
        TOKENS * seq_len / 2,
        TOKENS * HEADS * head_size,
        TOKENS * KV_HEADS * head_size,
        width=HEADS * head_size,
        value_widths=max(head_size, v_head_size) // head_size,
        backward=backward,
    )


def subjects(shape: tuple[int, int, int]) -> list[Subject]:
    """The function gives the choice of each kernel's tile, after the matmul they are held to."""
    choices = {kernel: [(tile,) for tile in candidates(kernel)] for kernel in KERNELS}
    return [mma_matmul_subject(), *(subject((name,), choices[name], shape) for name in KERNELS)]


def main(argv: list[str] | None = None) -> None:
    """The command measures, and prints the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--v-head-size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.seq_len <= TOKENS:
        parser.error(f"--seq-len {arguments.seq_len}: it must be 1 to {TOKENS}")
    shape = arguments.head_size, arguments.v_head_size, arguments.seq_len
    with tuning(parser, arguments):
        misfits = compile_ahead(partial(subjects, shape), arguments.as_capability)
        plain, *rankings = (rank(subject, misfits) for subject in subjects(shape))
        best = {
            kernel: Tile(*ranking.best.values[0])
            for kernel, ranking in zip(KERNELS, rankings, strict=True)
        }
        backward = subject(KERNELS[1:], [(best["dq"], best["dk_dv"])], shape)
        row = capability(torch.device("cuda"))
        conclude([plain, *rankings, rank(backward, misfits)], row, arguments.output)
        print(f"    {shape[0], max(shape[:2])}: Config(")
        for kernel, tile in best.items():
            print(f"        {kernel}=Tile({', '.join(map(str, tile))}),")
        print("    ),")


if __name__ == "__main__":
    main()
