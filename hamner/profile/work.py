"""The module says what an operation must compute and move, from the shapes the profiler recorded.

It reads `hamner.plan.costs`: every operand read once, every result written once. A kernel is held
against that floor, so whatever it reads again counts against it. Operations without a formula here
have no floor and none is invented. Torch-free.
"""

import math
import re
from collections.abc import Callable
from functools import partial

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
    "signed char": 1,
}

Formula = Callable[[Range], Cost]
"""the work of an operation; in what follows all arguments but the operation are positions of its"""


def _given(operation: Range, position: int) -> bool:
    """`_given` says whether an optional tensor was passed."""
    return operation.types[position] in _ELEMENT_BYTES and 0 not in operation.dims[position]


def _count(operation: Range, position: int) -> int:
    return math.prod(operation.dims[position])


def _element_size(operation: Range, position: int) -> int:
    return _ELEMENT_BYTES[operation.types[position]]


def _is_backward(operation: Range) -> bool:
    return operation.name.endswith("backward")


def _matmul(operation: Range, first: int = 0) -> Cost:
    """A matmul is (..., M, K) x (..., K, N) or, by experts, (M, K) x (E, K, N)."""
    left, right = operation.dims[first], operation.dims[first + 1]
    rows, experts = math.prod(left[:-1]), math.prod(right[:-2])
    if len(left) == 2 and len(right) == 2 and left[1] != right[0]:
        raise ValueError("not a matmul's shapes")
    size = _element_size(operation, first)
    return costs.matmul(rows, left[-1], right[-1], experts=experts, element_size=size)


def _int8_matmul(operation: Range) -> Cost:
    """Values are (M, K) and (N, K), each before its scales; the result is in bf16, as in training,
    since the profiler records no dtype that is asked for."""
    (rows, k), columns = operation.dims[0], operation.dims[2][0]
    return costs.int8_matmul(rows, k, columns)


def _moe_matmuls(operation: Range, x: int, down_weight: int) -> Cost:
    """The experts' down weights are (E, D, I); the routing weights follow x."""
    experts, width, inner = operation.dims[down_weight]
    return costs.moe_mlp(
        _count(operation, x),
        _count(operation, x + 1),
        width=width,
        inner=inner,
        experts=experts,
        element_size=_element_size(operation, x),
        backward=_is_backward(operation),
    )


def _attention(operation: Range, q: int, causal: int, *, is_aten: bool = False) -> Cost:
    """Attention's q is (B, H, T, hd) in ATen and (B, T, H, hd) elsewhere; k comes after it."""
    batch, *middle, size = operation.dims[q]
    num_heads, length = middle if is_aten else reversed(middle)
    keys = operation.dims[q + 1][2 if is_aten else 1]
    square = batch * length * keys
    return costs.attention(
        square / 2 if operation.values[causal] == "True" else square,
        _count(operation, q),
        _count(operation, q + 1),
        width=num_heads * size,
        element_size=_element_size(operation, q),
        backward=_is_backward(operation),
    )


def _own_attention(operation: Range, q: int) -> Cost:
    """The one boolean of these ops is the causal mask, which halves the square; with int32
    documents the square is not known."""
    if "int" in operation.types:
        raise ValueError("documents shorten attention by an amount that is not recorded")
    (causal,) = (i for i, value in enumerate(operation.values) if value in ("True", "False"))
    return _attention(operation, q, causal)


def _packed_attention(operation: Range, qkv: int, query_elements: int) -> Cost:
    """Here q is packed with k and v, (B, T, (H + 2 KV) hd)."""
    if "int" in operation.types:
        raise ValueError("documents shorten attention by an amount that is not recorded")
    batch, length, _ = operation.dims[qkv]
    square = batch * length**2
    return costs.attention(
        square / 2 if "True" in operation.values else square,
        query_elements,
        (_count(operation, qkv) - query_elements) // 2,
        width=query_elements // (batch * length),
        element_size=_element_size(operation, qkv),
        backward=_is_backward(operation),
    )


def _packed_attention_forward(operation: Range) -> Cost:
    """The numbers of heads follow qkv; newer traces have `hamner::flash_attention` in its place."""
    num_heads, num_kv_heads = map(int, operation.values[1:3])
    elements = _count(operation, 0) * num_heads // (num_heads + 2 * num_kv_heads)
    return _packed_attention(operation, qkv=0, query_elements=elements)


def _packed_attention_backward(operation: Range) -> Cost:
    """The output follows qkv."""
    return _packed_attention(operation, qkv=1, query_elements=_count(operation, 2))


def _norm(
    operation: Range,
    x: int,
    residual: int | None = None,
    kept: int | None = None,
    quantises: int | None = None,
) -> Cost:
    """Nothing is added where `residual` is absent; the result is recomputed where `kept` is;
    `quantises` says whether the gradient of x is written in int8 too."""
    cost = costs.rms_norm(
        _count(operation, x),
        _element_size(operation, x),
        adds_residual=residual is not None and _given(operation, residual),
        backward=_is_backward(operation),
        recompute=kept is not None and not _given(operation, kept),
    )
    return cost + _also_in_int8(operation, x, quantises)


def _also_in_int8(operation: Range, tensor: int, quantises: int | None) -> Cost:
    """A byte an element of `tensor` is written, where the argument at `quantises` says so."""
    if quantises is None or operation.values[quantises : quantises + 1] != ["True"]:
        return Cost()
    return Cost(bytes=_count(operation, tensor))


def _swiglu(
    operation: Range, gate_up: int, kept: int | None = None, quantises: int | None = None
) -> Cost:
    """`kept` is the position of SwiGLU's result, absent where it is recomputed; `quantises` says
    whether the gradient of gate_up is written in int8 too."""
    cost = costs.swiglu(
        _count(operation, gate_up) // 2,
        _element_size(operation, gate_up),
        backward=_is_backward(operation),
        recompute=kept is not None and not _given(operation, kept),
    )
    return cost + _also_in_int8(operation, gate_up, quantises)


def _router(operation: Range, x: int) -> Cost:
    """Its fp32 products are without tensor cores, whose peak says nothing of them: bytes alone."""
    *rows, width = operation.dims[x]
    experts, size = operation.dims[x + 1][0], _element_size(operation, x)
    backward = _is_backward(operation)
    cost = costs.router_linear(math.prod(rows), width, experts, size, backward=backward)
    return Cost(bytes=cost.bytes)


def _rotated(operation: Range, heads: int, weight: int | None = None) -> float:
    """The elements of q and k are so many in rows packed with v, of the first argument's width or,
    where a weight is given, of the width that the matmul with it makes."""
    *rows, width = operation.dims[0]
    if weight is not None:
        width = operation.dims[weight][0]
    num_heads, num_kv_heads = map(int, operation.values[heads : heads + 2])
    return math.prod(rows) * width * (num_heads + num_kv_heads) / (num_heads + 2 * num_kv_heads)


def _rope(operation: Range, heads: int, weight: int | None = None) -> Cost:
    return costs.rope(_rotated(operation, heads, weight), _element_size(operation, 0))


def _qk_norm(operation: Range, heads: int) -> Cost:
    """The first argument is qkv, or in backward the gradient, as wide."""
    rotated, size = _rotated(operation, heads), _element_size(operation, 0)
    return costs.qk_norm_rope(rotated, size, backward="backward" in operation.name)


def _loss(operation: Range) -> Cost:
    """Logits are read and written once; the matmuls around them count as matmuls."""
    (tokens, width), vocab_size = operation.dims[0], operation.dims[1][0]
    cost = costs.linear_cross_entropy(tokens, width, vocab_size, _element_size(operation, 0))
    return Cost(bytes=cost.bytes)


def _adamw(operation: Range) -> Cost:
    """The profiler records no dtypes of tensors in lists, so those of training are taken.

    They are bf16 weights and gradients beside split masters, or everything in fp32 where no compute
    copy is listed.
    """
    parameters = _parameters(operation)
    if operation.dims[0]:
        return costs.adamw(parameters, split_master=True)
    return costs.adamw(parameters, split_master=False, gradient_size=costs.FP32, has_copy=False)


def _muon_momentum(operation: Range) -> Cost:
    """The dtypes are taken as in `_adamw`; which of the two it is, this operation's lists do not
    say."""
    return costs.muon_momentum(_parameters(operation))


def _muon_apply(operation: Range) -> Cost:
    parameters = _parameters(operation)
    if operation.dims[0]:
        return costs.muon_apply(parameters, split_master=True)
    how = {"update_size": costs.FP32, "has_copy": False}
    return costs.muon_apply(parameters, split_master=False, **how)


def _parameters(operation: Range) -> int:
    """Elements of the masters, which are the second list of an optimizer's operation.

    ValueError: the profiler has left out the shapes, as it does of a list of more than 30 tensors.
    """
    masters = operation.dims[1]
    if not masters:
        raise ValueError("no shapes of the masters were recorded")
    return sum(math.prod(shape) for shape in masters)


def _symmetric_product(operation: Range) -> Cost:
    batch, rows, k = operation.dims[0]
    how = {"element_size": _element_size(operation, 0), "has_addend": _given(operation, 1)}
    return costs.symmetric_product(batch, rows, k, **how)


def _tensor_bytes(operation: Range) -> list[int]:
    tensors = [i for i, kind in enumerate(operation.types) if kind in _ELEMENT_BYTES]
    return [_count(operation, i) * _element_size(operation, i) for i in tensors]


# By category of the kernel, then by operation; positions are those of the op's schema.
_FORMULAS: dict[str, dict[str, Formula]] = {
    "matmul": {
        "aten::mm": _matmul,
        "aten::bmm": _matmul,
        "aten::_grouped_mm": _matmul,
        "aten::_scaled_mm": _matmul,
        "aten::addmm": partial(_matmul, first=1),
        "aten::addmm_": partial(_matmul, first=1),
        "aten::baddbmm": partial(_matmul, first=1),
        "hamner::int8_matmul": _int8_matmul,
        "hamner::quantize_int8": lambda op: costs.quantize_int8(
            _count(op, 0), _element_size(op, 0)
        ),
        "hamner::moe_mlp": partial(_moe_matmuls, x=0, down_weight=5),
        "hamner::moe_mlp_backward": partial(_moe_matmuls, x=1, down_weight=8),
    },
    "attention": {
        "aten::_scaled_dot_product_flash_attention": partial(
            _attention, q=0, causal=4, is_aten=True
        ),
        "aten::_scaled_dot_product_cudnn_attention": partial(
            _attention, q=0, causal=6, is_aten=True
        ),
        "aten::_scaled_dot_product_flash_attention_backward": partial(
            _attention, q=1, causal=11, is_aten=True
        ),
        "aten::_scaled_dot_product_cudnn_attention_backward": partial(
            _attention, q=1, causal=14, is_aten=True
        ),
        "flash_attn::_flash_attn_forward": partial(_attention, q=0, causal=5),
        "flash_attn::_flash_attn_backward": partial(_attention, q=1, causal=11),
        "hamner::flash_attention": partial(_own_attention, q=0),
        "hamner::flash_attention_backward": partial(_own_attention, q=1),
        "hamner::flash_attention_qkv": _packed_attention_forward,
        "hamner::flash_attention_qkv_backward": _packed_attention_backward,
    },
    "norm": {
        "hamner::rms_norm": partial(_norm, x=0, residual=1),
        # As traces have it from before one op did both.
        "hamner::add_rms_norm": partial(_norm, x=0, residual=1),
        "hamner::rms_norm_backward": partial(_norm, x=2, residual=1),
        "hamner::rms_norm_linear": partial(_norm, x=0, residual=1),
        "hamner::rms_norm_linear_backward": partial(_norm, x=2, residual=1, kept=4, quantises=17),
    },
    "rope": {
        # Of the matmul's result, in place.
        "hamner::rms_norm_linear": partial(_rope, heads=9, weight=3),
        # Into a fresh tensor: v is copied along. Absent where attention's backward rotates.
        "hamner::rms_norm_linear_backward": lambda op: costs.rope(
            _count(op, 0), _element_size(op, 0)
        ),
        "hamner::rope_packed_": partial(_rope, heads=3),
        # Where v is copied along, that is above the floor.
        "hamner::qk_norm_rope": partial(_qk_norm, heads=6),
        "hamner::qk_norm_rope_backward": partial(_qk_norm, heads=7),
        "hamner::qk_norm_rope_backward_": partial(_qk_norm, heads=7),
        "hamner::rope": lambda op: costs.rope(_count(op, 0) + _count(op, 1), _element_size(op, 0)),
    },
    "swiglu": {
        "hamner::swiglu": partial(_swiglu, gate_up=0),
        "hamner::swiglu_linear": partial(_swiglu, gate_up=0),
        "hamner::swiglu_backward": partial(_swiglu, gate_up=1),
        "hamner::swiglu_linear_backward": partial(_swiglu, gate_up=1, kept=2, quantises=6),
    },
    "loss": {
        "hamner::linear_cross_entropy": _loss,
        "hamner::linear_cross_entropy_backward": lambda op: costs.scale_loss_gradients(
            _count(op, 1), _count(op, 2), _element_size(op, 1)
        ),
    },
    "routing": {
        "hamner::router_linear": partial(_router, x=0),
        "hamner::router_linear_backward": partial(_router, x=1),
    },
    "optimizer": {
        "hamner::adamw_": _adamw,
        "hamner::muon_momentum_": _muon_momentum,
        "hamner::muon_apply_": _muon_apply,
        "hamner::symmetric_product_": _symmetric_product,
    },
}
# Whatever they are part of: copy_ and Inductor's kernels list what they write among their
# arguments, the next only read, and elementwise operations write a result as large as the largest
# operand.
_LISTS_ALL = re.compile(r"aten::copy_|triton_(poi|red|per)_fused_.*|aten::(sum|mean|zero_|fill_)")
_ELEMENTWISE = re.compile(r"aten::(add|sub|mul|div|neg|silu|sigmoid|pow|rsqrt|silu_backward)_?")


def work_of(category: str, caller: Range | None) -> tuple[Range, Cost] | None:
    """The function finds the operation a kernel of `category` works for and what that must do.

    None is for the unknown. Several kernels may work for one operation, which is returned too.
    """
    for operation in caller.chain() if caller is not None else ():
        formula = _formula(category, operation.name)
        if formula is not None and operation.is_operation and operation.dims:
            # Another version's operation may have other arguments: no floor then.
            try:
                return operation, formula(operation)
            except (IndexError, KeyError, ValueError, TypeError):
                return None
    return None


def _formula(category: str, name: str) -> Formula | None:
    if name in _FORMULAS.get(category, ()):
        return _FORMULAS[category][name]
    if _LISTS_ALL.fullmatch(name):
        return lambda op: Cost(bytes=sum(_tensor_bytes(op)))
    if _ELEMENTWISE.fullmatch(name):
        return lambda op: Cost(bytes=sum(_tensor_bytes(op)) + max(_tensor_bytes(op)))
    return None
