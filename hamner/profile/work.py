"""The FLOPs and bytes an operation must move, from the shapes the profiler recorded.

The least that the operation needs: every operand read once, every result written once. A kernel is
held against that floor, so whatever it reads again counts against it. Operations without a formula
here have no floor and none is invented. Torch-free.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from hamner.hardware import Gpu
from hamner.profile.trace import Range


@dataclass(frozen=True)
class Work:
    """What a piece of work must compute and move."""

    flops: float
    bytes: float

    def floor_seconds(self, gpu: Gpu, precision: str) -> float:
        """The longer of arithmetic at peak and traffic at full bandwidth."""
        peak = gpu.peak_tflops(precision) * 1e12
        return max(self.flops / peak, self.bytes / (gpu.bandwidth_gbs * 1e9))

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


_ELEMENT_BYTES = {
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "float": 4,
    "double": 8,
    "long int": 8,
    "int": 4,
    "short int": 2,
    "bool": 1,
    "unsigned char": 1,
}


class Arguments:
    """An operation's arguments by position."""

    def __init__(self, operation: Range) -> None:
        self.dims, self.types = operation.dims, operation.types
        self.values = operation.values

    def given(self, position: int) -> bool:
        """Whether an optional tensor was passed."""
        return self.types[position] in _ELEMENT_BYTES and 0 not in self.dims[position]

    def shape(self, position: int) -> list[int]:
        """Shape of a tensor."""
        return self.dims[position]

    def count(self, position: int) -> int:
        """Elements of a tensor."""
        return math.prod(self.dims[position])

    def element(self, position: int) -> int:
        """Bytes an element of a tensor."""
        return _ELEMENT_BYTES[self.types[position]]

    def size(self, position: int) -> int:
        """Bytes of a tensor."""
        return self.count(position) * self.element(position)

    def all_tensors(self) -> int:
        """Bytes of every tensor together."""
        tensors = [i for i, kind in enumerate(self.types) if kind in _ELEMENT_BYTES]
        return sum(self.size(i) for i in tensors)

    def largest(self) -> int:
        """Bytes of the largest tensor: what an elementwise operation writes."""
        return max((self.size(i) for i, k in enumerate(self.types) if k in _ELEMENT_BYTES))


def _matmul(first: int) -> Callable[[Arguments], Work]:
    """(..., M, K) x (..., K, N) or, by experts, (M, K) x (E, K, N); `first` is the left operand."""

    def work(a: Arguments) -> Work:
        left, right = a.shape(first), a.shape(first + 1)
        result = math.prod(left[:-1]) * right[-1]
        if len(left) == 2 and len(right) == 2 and left[1] != right[0]:
            raise ValueError("not a matmul's shapes")
        moved = a.size(first) + a.size(first + 1) + result * a.element(first)
        return Work(2 * result * left[-1], moved)

    return work


def _moe_matmuls(x: int, routing_weights: int, down_weight: int, matmuls: int):
    """The experts of a mixture: `matmuls` products of the size of the down projection."""

    def work(a: Arguments) -> Work:
        rows = a.count(routing_weights)
        _, width, inner = a.shape(down_weight)
        weights = 3 * a.size(down_weight) * (1 if matmuls == 3 else 2)
        return Work(2 * matmuls * rows * width * inner, 2 * a.size(x) + weights)

    return work


def _attention(q: int, *, heads_first: bool, causal: int, backward: bool, documents: int = -1):
    """q (B, H, T, hd) or (B, T, H, hd), k after it; a causal mask halves the square.

    `causal` and `documents` are positions of arguments; with documents the square is not known.
    """

    def work(a: Arguments) -> Work:
        if documents >= 0 and a.given(documents):
            raise ValueError("documents shorten attention by an amount that is not recorded")
        batch, *middle, size = a.shape(q)
        heads, length = middle if heads_first else reversed(middle)
        keys = a.shape(q + 1)[2 if heads_first else 1]
        square = batch * heads * length * keys * size
        if a.values[causal] == "True":
            square /= 2
        moved = 2 * (a.size(q) + a.size(q + 1)) * (2 if backward else 1)
        return Work((10 if backward else 4) * square, moved)

    return work


def _packed_attention(qkv: int, heads: int, *, causal: int, backward: bool, documents: int):
    """Packed qkv (B, T, (H + 2 KV) hd); positions as in `_attention`."""

    def work(a: Arguments) -> Work:
        if a.given(documents):
            raise ValueError("documents shorten attention by an amount that is not recorded")
        batch, length, width = a.shape(qkv)
        num_heads, num_kv_heads = int(a.values[heads]), int(a.values[heads + 1])
        out = width * num_heads // (num_heads + 2 * num_kv_heads)
        square = batch * length * length * out
        if a.values[causal] == "True":
            square /= 2
        tokens = batch * length * a.element(qkv)
        return Work(
            (10 if backward else 4) * square, tokens * (width + out) * (2 if backward else 1)
        )

    return work


def _moves(bytes_moved: Callable[[Arguments], float]) -> Callable[[Arguments], Work]:
    """Work that is only traffic."""
    return lambda a: Work(0, bytes_moved(a))


def _rotated_size(a: Arguments, num_rows: int, width: int, heads: int) -> float:
    """Elements of q and k in packed rows."""
    num_heads, num_kv_heads = int(a.values[heads]), int(a.values[heads + 1])
    return num_rows * width * (num_heads + num_kv_heads) / (num_heads + 2 * num_kv_heads)


def _rotates(a: Arguments) -> float:
    """Of `hamner::rms_norm_linear`: its matmul's result, in place."""
    rows = a.count(0) // a.shape(0)[-1]
    return 2 * _rotated_size(a, rows, a.shape(3)[0], heads=9) * a.element(0)


def _adamw(a: Arguments) -> float:
    """Master and moments read and written, the gradient read, the compute copy written.

    The profiler records no dtypes of tensors in lists. Those of training are taken: bf16 weights
    and gradients beside split masters, or everything in fp32 where no compute copy is listed.
    """
    copies, masters = a.dims[0], a.dims[1]
    return sum(math.prod(shape) for shape in masters) * (26 if copies else 28)


# (category of the kernel, operation's name) -> work; positions are those of the op's schema.
_FORMULAS: tuple[tuple[str, re.Pattern, Callable[[Arguments], Work]], ...] = tuple(
    (category, re.compile(name), work)
    for category, name, work in (
        ("matmul", r"aten::(mm|bmm|_grouped_mm|_scaled_mm)", _matmul(0)),
        ("matmul", r"aten::(addmm_?|baddbmm)", _matmul(1)),
        ("matmul", r"hamner::moe_mlp", _moe_matmuls(0, 1, 5, matmuls=3)),
        ("matmul", r"hamner::moe_mlp_backward", _moe_matmuls(1, 2, 8, matmuls=6)),
        (
            "attention",
            r"aten::_scaled_dot_product_flash_attention",
            _attention(0, heads_first=True, causal=4, backward=False),
        ),
        (
            "attention",
            r"aten::_scaled_dot_product_cudnn_attention",
            _attention(0, heads_first=True, causal=6, backward=False),
        ),
        (
            "attention",
            r"aten::_scaled_dot_product_flash_attention_backward",
            _attention(1, heads_first=True, causal=11, backward=True),
        ),
        (
            "attention",
            r"aten::_scaled_dot_product_cudnn_attention_backward",
            _attention(1, heads_first=True, causal=14, backward=True),
        ),
        (
            "attention",
            r"flash_attn::_flash_attn_forward",
            _attention(0, heads_first=False, causal=5, backward=False),
        ),
        (
            "attention",
            r"flash_attn::_flash_attn_backward",
            _attention(1, heads_first=False, causal=11, backward=True),
        ),
        (
            "attention",
            r"hamner::flash_attention",
            _attention(0, heads_first=False, causal=5, backward=False, documents=3),
        ),
        (
            "attention",
            r"hamner::flash_attention_backward",
            _attention(1, heads_first=False, causal=8, backward=True, documents=6),
        ),
        (
            "attention",
            r"hamner::flash_attention_qkv",
            _packed_attention(0, 1, causal=5, backward=False, documents=3),
        ),
        (
            "attention",
            r"hamner::flash_attention_qkv_backward",
            _packed_attention(1, 6, causal=8, backward=True, documents=4),
        ),
        ("norm", r"hamner::rms_norm", _moves(lambda a: 2 * a.size(0))),
        ("norm", r"hamner::add_rms_norm", _moves(lambda a: 4 * a.size(0))),
        (
            "norm",
            r"hamner::rms_norm_backward",
            _moves(lambda a: (4 if a.given(1) else 3) * a.size(2)),
        ),
        (
            "norm",
            r"hamner::rms_norm_linear",
            _moves(lambda a: (4 if a.given(1) else 2) * a.size(0)),
        ),
        (
            "norm",
            r"hamner::rms_norm_linear_backward",
            # The operand is written too where it was not kept.
            _moves(lambda a: (3 + a.given(1) + (not a.given(4))) * a.size(2)),
        ),
        ("rope", r"hamner::rms_norm_linear", _moves(_rotates)),
        # Into a fresh tensor: v is copied along. Absent where attention's backward rotates.
        ("rope", r"hamner::rms_norm_linear_backward", _moves(lambda a: 2 * a.size(0))),
        (
            "rope",
            r"hamner::rope_packed_",
            _moves(
                lambda a: (
                    2
                    * a.element(0)
                    * _rotated_size(a, a.count(0) // a.shape(0)[-1], a.shape(0)[-1], heads=3)
                )
            ),
        ),
        ("rope", r"hamner::rope", _moves(lambda a: 2 * (a.size(0) + a.size(1)))),
        ("swiglu", r"hamner::swiglu(_linear)?", _moves(lambda a: 1.5 * a.size(0))),
        ("swiglu", r"hamner::swiglu_backward", _moves(lambda a: 2.5 * a.size(1))),
        (
            "swiglu",
            r"hamner::swiglu_linear_backward",
            _moves(lambda a: (2.5 if a.given(2) else 3) * a.size(1)),
        ),
        (
            "loss",
            r"hamner::linear_cross_entropy",
            # Logits read and written once, in place; the matmuls around them count as matmuls.
            _moves(lambda a: 2 * a.shape(0)[0] * a.shape(1)[0] * a.element(0)),
        ),
        (
            "loss",
            r"hamner::linear_cross_entropy_backward",
            _moves(lambda a: 2 * a.size(1) + a.size(2) + a.count(2) * a.element(1)),
        ),
        ("routing", r"hamner::router_linear", _moves(lambda a: a.size(0))),
        ("routing", r"hamner::router_linear_backward", _moves(lambda a: a.size(0) + 2 * a.size(1))),
        ("optimizer", r"hamner::adamw_", _moves(_adamw)),
    )
)
# Elementwise operations, whatever they are part of: operands read, a result as large as the largest
# written. copy_ and Inductor's kernels list what they write among their arguments.
_ELEMENTWISE = re.compile(r"aten::(add|sub|mul|div|neg|silu|sigmoid|pow|rsqrt|silu_backward)_?")
_LISTS_RESULTS = re.compile(r"aten::copy_|triton_(poi|red|per)_fused_.*")
_READS_ONLY = re.compile(r"aten::(sum|mean|zero_|fill_)")


def work_of(category: str, caller: Range | None) -> tuple[Range, Work] | None:
    """The operation a kernel of `category` works for, with what it must do; None if unknown.

    Several kernels may work for one operation, which is therefore returned too.
    """
    if caller is None:
        return None
    for operation in caller.chain():
        if not operation.is_operation or not operation.dims:
            continue
        formula = _formula(category, operation.name)
        if formula is not None:
            # Another version's operation may have other arguments: no floor then.
            try:
                return operation, formula(Arguments(operation))
            except (IndexError, KeyError, ValueError, TypeError):
                return None
    return None


def _formula(category: str, name: str) -> Callable[[Arguments], Work] | None:
    for wanted, pattern, formula in _FORMULAS:
        if wanted == category and pattern.fullmatch(name):
            return formula
    if _LISTS_RESULTS.fullmatch(name) or _READS_ONLY.fullmatch(name):
        return _moves(Arguments.all_tensors)
    if _ELEMENTWISE.fullmatch(name):
        return _moves(lambda a: a.all_tensors() + a.largest())
    return None
