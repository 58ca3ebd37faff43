"""Triton's interpreter without work that it repeats, and with the same results on every CPU.

A launch exchanges what `triton.language` offers for functions that compute with NumPy. Triton does
so again in every call that one jitted function makes of another, thousands in a launch, although
nothing has changed it back. With every sum and product of integers it computes in 64 bits whether
they overflow, half of all time, and drops the answer, which only a debugger's assertions read. And
for every result it makes its type and its shape anew.

It multiplies tiles by NumPy, whose BLAS sums in an order of the CPU's: that of some makes x times
its own transpose unsymmetric in the last bit, and decides how near to a bound an error comes.
"""

import dataclasses
import functools
import inspect

import numpy as np
from triton import language
from triton.runtime import interpreter

_exchange = interpreter._patch_lang
_exchanged: set[str] = set()
"""modules whose functions are exchanged in the launch at hand"""
_find_numpy_type = interpreter._get_np_dtype
_numpy_types = {}
"""by name of Triton's type, as types cannot all be keys; so are the others"""
_make_block, _make_tensor = language.block_type.__init__, language.tensor.__init__
_blocks, _shapes = {}, {}
_builder = interpreter.interpreter_builder
_multiply = _builder.create_dot


class _Scope:
    """What a launch ends with, if its call was the one that began the exchange."""

    def __init__(self, scope=None) -> None:
        self.scope = scope

    def restore(self) -> None:
        if self.scope is not None:
            _exchanged.clear()
            self.scope.restore()


@functools.cache
def _modules(function) -> frozenset[str]:
    """What is to be exchanged for a function: the modules of the language that it sees."""
    return frozenset(
        value.__name__
        for value in function.__globals__.values()
        if inspect.ismodule(value) and value in (language, language.core)
    )


def _exchange_once(function) -> _Scope:
    modules = _modules(function)
    if modules and modules <= _exchanged:
        return _Scope()
    scope = _exchange(function)
    _exchanged.update(modules)
    return _Scope(scope)


def _numpy_type(dtype: language.dtype):
    if dtype.name not in _numpy_types:
        _numpy_types[dtype.name] = _find_numpy_type(dtype)
    return _numpy_types[dtype.name]


def _block(self: language.block_type, element_ty: language.dtype, shape) -> None:
    """Stands for the method that makes a type of a block."""
    key = element_ty.name, *(n.value if isinstance(n, language.constexpr) else n for n in shape)
    if key not in _blocks:
        _make_block(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _blocks[key]


def _tensor(self: language.tensor, handle, type: language.dtype) -> None:
    """Stands for the method that makes a tensor of a type."""
    if type.name not in _shapes:
        _make_tensor(self, handle, type)
        _shapes[type.name] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[type.name]


def _dot(a, b, acc, *options):
    """Stands for the product of two tiles: in float64, rounded once, any order gives one sum."""
    if acc.data.dtype != np.float32 or a.data.dtype.kind != "f" or b.data.dtype.kind != "f":
        return _multiply(a, b, acc, *options)
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
    return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)


def adapt() -> None:
    """Let launches of this process do so; another version of Triton stays as it is."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._patch_lang = _exchange_once
    interpreter._get_np_dtype = _numpy_type
    language.block_type.__init__, language.tensor.__init__ = _block, _tensor
    _builder.create_dot = _dot
    if not _builder.options.debug:
        _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)
