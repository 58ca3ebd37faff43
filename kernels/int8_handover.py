"""A norm's backward quantises the gradient that it writes, for the linear layer before the norm.

The gradient of a linear layer's result is written by the backward of the norm that reads the
result, in another autograd function, and autograd passes nothing but the gradient from one to the
other. So a model gives both functions the same `Handover`: the norm's backward leaves the gradient
there as int8, and the layer's, which runs after it, takes it. Saved are a kernel and the gradient's
second read, 2 N D bytes in bf16.

A gradient that has another part (its tensor has another reader) is another tensor than the one that
was left, and the layer quantises it by itself.
"""

from torch import Tensor

from hamner.kernels.int8_quantize import Int8Matrix


class Handover:
    """The object holds an int8 matrix from the moment it is left until it is taken."""

    def __init__(self) -> None:
        self._left: tuple[Tensor, int, Int8Matrix] | None = None

    def leave(self, gradient: Tensor, rows: Int8Matrix) -> None:
        """The method is called by who writes the gradient (..., D); rows is it quantised, (N, D),
        with one scale a row."""
        # With a reference to it autograd adds nothing to the gradient in place, and its memory is
        # no other tensor's.
        self._left = gradient, gradient._version, rows

    def take(self, gradient: Tensor) -> Int8Matrix | None:
        """The method gives what was left of this gradient, once, or None if another was left."""
        left, self._left = self._left, None
        if left is None:
            return None
        written, version, rows = left
        is_it = (
            gradient.data_ptr() == written.data_ptr()
            and gradient.shape == written.shape
            and gradient.is_contiguous()
            and gradient._version == version
        )
        return rows if is_it else None
