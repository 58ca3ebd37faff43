"""Triton's interpreter without work that it repeats: the same operations in less time.

A launch exchanges what `triton.language` offers for functions that compute with NumPy. Triton does
so again in every call that one jitted function makes of another, thousands in a launch, although
nothing has changed it back.
"""

import inspect

from triton import language
from triton.runtime import interpreter

_exchange = interpreter._patch_lang
_exchanged: set[str] = set()
"""modules whose functions are exchanged in the launch at hand"""


class _Scope:
    """What a launch ends with, if its call was the one that began the exchange."""

    def __init__(self, scope=None) -> None:
        self.scope = scope

    def restore(self) -> None:
        if self.scope is not None:
            _exchanged.clear()
            self.scope.restore()


def _exchange_once(function) -> _Scope:
    modules = {
        value.__name__
        for value in function.__globals__.values()
        if inspect.ismodule(value) and value in (language, language.core)
    }
    if modules and modules <= _exchanged:
        return _Scope()
    scope = _exchange(function)
    _exchanged.update(modules)
    return _Scope(scope)


def avoid_repetition() -> None:
    """Let launches of this process do it once; another version of Triton stays as it is."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _exchange_once
