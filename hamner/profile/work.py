"""The module says what an operation must compute and move, from the shapes the profiler recorded.

It reads `hamner.plan.costs`: every operand read once, every result written once. A kernel is held
against that floor, so whatever it reads again counts against it. Operations without a formula here
have no floor and none is invented. Torch-free.
"""

import math
import re
from collections.abc import Callable

from hamner.plan import costs
from hamner.plan.costs import Cost
from hamner.profile.trace import Range

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
    """The arguments of an operation are read by position."""

    def __init__(self, operation: Range) -> None:
        self.dims, self.types = operation.dims, operation.types
        self.values = operation.values

    def given(self, position: int) -> bool:
        """It says whether an optional tensor was passed."""
        return self.types[position] in _ELEMENT_BYTES and 0 not in self.dims[position]

    def shape(self, position: int) -> list[int]:
        """The tensor has this shape."""
        return self.dims[position]

    def count(self, position: int) -> int:
        """The tensor has this many elements."""
        return math.prod(self.dims[position])

    def element(self, position: int) -> int:
        """An element of the tensor has this many bytes."""
        return _ELEMENT_BYTES[self.types[position]]

    def size(self, position: int) -> int:
        """The tensor has this many bytes."""
        return self.count(position) * self.element(position)

    def all_tensors(self) -> int:
        """All tensors together have this many bytes."""
        tensors = [i for i, kind in enumerate(self.types) if kind in _ELEMENT_BYTES]
        return sum(self.size(i) for i in tensors)

    def largest(self) -> int:
        """The largest tensor, which elementwise operations write, has this many bytes."""
        return max((self.size(i) for i, k in enumerate(self.types) if k in _ELEMENT_BYTES))


Formula = Callable[[Arguments], Cost]


def _matmul(first: int) -> Formula:
    """It is (..., M, K) x (..., K, N) or, by experts, (M, K) x (E, K, N), from argument `first`."""

    def cost(a: Arguments) -> Cost:
        left, right = a.shape(first), a.shape(first + 1)
        rows = math.prod(left[:-1])
        if len(left) == 2 and len(right) == 2 and left[1] != right[0]:
            raise ValueError("not a matmul's shapes")
        experts = math.prod(right[:-2])
        return costs.matmul(
            rows, left[-1], right[-1], experts=experts, element_size=a.element(first)
        )

    return cost


def _moe_matmuls(x: int, routing_weights: int, down_weight: int, *, backward: bool) -> Formula:
    """The arguments are positions."""

    def cost(a: Arguments) -> Cost:
        experts, width, inner = a.shape(down_weight)
        return costs.moe_mlp(
            a.count(x),
            a.count(routing_weights),
            width=width,
            inner=inner,
            experts=experts,
            element_size=a.element(x),
            backward=backward,
        )

    return cost


def _attention(
    q: int, *, heads_first: bool, causal: int, backward: bool, documents: int = -1
) -> Formula:
    """Here q is (B, H, T, hd) or (B, T, H, hd), k comes after it; a causal mask halves the square.

    `causal` and `documents` are positions of arguments; with documents the square is not known.
    """

    def cost(a: Arguments) -> Cost:
        _refuse_documents(a, documents)
        batch, *middle, size = a.shape(q)
        heads, length = middle if heads_first else reversed(middle)
        keys = a.shape(q + 1)[2 if heads_first else 1]
        return costs.attention(
            _pairs(a, causal, batch * length * keys),
            a.count(q),
            a.count(q + 1),
            width=heads * size,
            element_size=a.element(q),
            backward=backward,
        )

    return cost


def _packed_attention(
    qkv: int, heads: int, *, causal: int, backward: bool, documents: int
) -> Formula:
    """Here qkv is packed, (B, T, (H + 2 KV) hd); positions are as in `_attention`."""

    def cost(a: Arguments) -> Cost:
        _refuse_documents(a, documents)
        batch, length, width = a.shape(qkv)
        num_heads, num_kv_heads = int(a.values[heads]), int(a.values[heads + 1])
        size = width // (num_heads + 2 * num_kv_heads)
        return costs.attention(
            _pairs(a, causal, batch * length * length),
            batch * length * num_heads * size,
            batch * length * num_kv_heads * size,
            width=num_heads * size,
            element_size=a.element(qkv),
            backward=backward,
        )

    return cost


def _refuse_documents(a: Arguments, position: int) -> None:
    if position >= 0 and a.given(position):
        raise ValueError("documents shorten attention by an amount that is not recorded")


def _pairs(a: Arguments, causal: int, square: int) -> float:
    return square / 2 if a.values[causal] == "True" else square


def _norm(
    x: int, *, residual: int | None = None, backward: bool = False, kept: int | None = None
) -> Formula:
    """Nothing is added where `residual` is absent; the result is recomputed where `kept` is."""

    def cost(a: Arguments) -> Cost:
        return costs.rms_norm(
            a.count(x),
            a.element(x),
            adds_residual=residual is not None and a.given(residual),
            backward=backward,
            recompute=kept is not None and not a.given(kept),
        )

    return cost


def _swiglu(gate_up: int, *, backward: bool = False, kept: int | None = None) -> Formula:
    """`kept` is the position of SwiGLU's result, absent where it is recomputed."""

    def cost(a: Arguments) -> Cost:
        recompute = kept is not None and not a.given(kept)
        elements = a.count(gate_up) // 2
        return costs.swiglu(elements, a.element(gate_up), backward=backward, recompute=recompute)

    return cost


def _router(x: int, experts: Callable[[Arguments], int], *, backward: bool) -> Formula:
    """Its fp32 products are without tensor cores, whose peak says nothing of them: bytes alone."""

    def cost(a: Arguments) -> Cost:
        tokens, width = a.count(x) // a.shape(x)[-1], a.shape(x)[-1]
        return _bytes_of(
            costs.router_linear(tokens, width, experts(a), a.element(x), backward=backward)
        )

    return cost


def _rope(packed: int, heads: int, width: Callable[[Arguments], int] | None = None) -> Formula:
    """Here q and k are rotated in rows packed with v, of the argument's width unless one is
    given."""

    def cost(a: Arguments) -> Cost:
        own_width = a.shape(packed)[-1]
        num_heads, num_kv_heads = int(a.values[heads]), int(a.values[heads + 1])
        elements = a.count(packed) // own_width * (width(a) if width else own_width)
        rotated = elements * (num_heads + num_kv_heads) / (num_heads + 2 * num_kv_heads)
        return costs.rope(rotated, a.element(packed))

    return cost


def _loss(a: Arguments) -> Cost:
    """Logits are read and written once; the matmuls around them count as matmuls."""
    (tokens, width), vocab_size = a.shape(0), a.shape(1)[0]
    return _bytes_of(costs.linear_cross_entropy(tokens, width, vocab_size, a.element(0)))


def _bytes_of(cost: Cost) -> Cost:
    return Cost(bytes=cost.bytes)


def _moves(bytes_moved: Callable[[Arguments], float]) -> Formula:
    """The work is only traffic."""
    return lambda a: Cost(bytes=bytes_moved(a))


def _adamw(a: Arguments) -> Cost:
    """The profiler records no dtypes of tensors in lists, so those of training are taken.

    They are bf16 weights and gradients beside split masters, or everything in fp32 where no compute
    copy is listed.
    """
    copies, masters = a.dims[0], a.dims[1]
    parameters = sum(math.prod(shape) for shape in masters)
    if copies:
        return costs.adamw(parameters, split_master=True)
    return costs.adamw(parameters, split_master=False, gradient_size=costs.FP32, has_copy=False)


# (category of the kernel, operation's name) -> work; positions are those of the op's schema.
_FORMULAS: tuple[tuple[str, re.Pattern, Formula], ...] = tuple(
    (category, re.compile(name), work)
    for category, name, work in (
        ("matmul", r"aten::(mm|bmm|_grouped_mm|_scaled_mm)", _matmul(0)),
        ("matmul", r"aten::(addmm_?|baddbmm)", _matmul(1)),
        ("matmul", r"hamner::moe_mlp", _moe_matmuls(0, 1, 5, backward=False)),
        ("matmul", r"hamner::moe_mlp_backward", _moe_matmuls(1, 2, 8, backward=True)),
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
        ("norm", r"hamner::rms_norm", _norm(0)),
        ("norm", r"hamner::add_rms_norm", _norm(0, residual=1)),
        ("norm", r"hamner::rms_norm_backward", _norm(2, residual=1, backward=True)),
        ("norm", r"hamner::rms_norm_linear", _norm(0, residual=1)),
        (
            "norm",
            r"hamner::rms_norm_linear_backward",
            _norm(2, residual=1, backward=True, kept=4),
        ),
        # Of the matmul's result, in place.
        ("rope", r"hamner::rms_norm_linear", _rope(0, heads=9, width=lambda a: a.shape(3)[0])),
        # Into a fresh tensor: v is copied along. Absent where attention's backward rotates.
        (
            "rope",
            r"hamner::rms_norm_linear_backward",
            lambda a: costs.rope(a.count(0), a.element(0)),
        ),
        ("rope", r"hamner::rope_packed_", _rope(0, heads=3)),
        ("rope", r"hamner::rope", lambda a: costs.rope(a.count(0) + a.count(1), a.element(0))),
        ("swiglu", r"hamner::swiglu(_linear)?", _swiglu(0)),
        ("swiglu", r"hamner::swiglu_backward", _swiglu(1, backward=True)),
        ("swiglu", r"hamner::swiglu_linear_backward", _swiglu(1, backward=True, kept=2)),
        ("loss", r"hamner::linear_cross_entropy", _loss),
        (
            "loss",
            r"hamner::linear_cross_entropy_backward",
            lambda a: costs.scale_loss_gradients(a.count(1), a.count(2), a.element(1)),
        ),
        (
            "routing",
            r"hamner::router_linear",
            _router(0, lambda a: a.shape(1)[0], backward=False),
        ),
        (
            "routing",
            r"hamner::router_linear_backward",
            _router(1, lambda a: a.shape(0)[-1], backward=True),
        ),
        ("optimizer", r"hamner::adamw_", _adamw),
    )
)
# Elementwise operations, whatever they are part of: operands read, a result as large as the largest
# written. copy_ and Inductor's kernels list what they write among their arguments.
_ELEMENTWISE = re.compile(r"aten::(add|sub|mul|div|neg|silu|sigmoid|pow|rsqrt|silu_backward)_?")
_LISTS_RESULTS = re.compile(r"aten::copy_|triton_(poi|red|per)_fused_.*")
_READS_ONLY = re.compile(r"aten::(sum|mean|zero_|fill_)")


def work_of(category: str, caller: Range | None) -> tuple[Range, Cost] | None:
    """The function finds the operation a kernel of `category` works for and what that must do.

    None is for the unknown. Several kernels may work for one operation, which is returned too.
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


def _formula(category: str, name: str) -> Formula | None:
    for wanted, pattern, formula in _FORMULAS:
        if wanted == category and pattern.fullmatch(name):
            return formula
    if _LISTS_RESULTS.fullmatch(name) or _READS_ONLY.fullmatch(name):
        return _moves(Arguments.all_tensors)
    if _ELEMENTWISE.fullmatch(name):
        return _moves(lambda a: a.all_tensors() + a.largest())
    return None
