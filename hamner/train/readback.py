"""Numbers on their way from the device to the host, without waiting for them."""

import torch
from torch import Tensor


class Readback:
    """Copies a tensor to the host behind the work that is queued on its device.

    Args:
        values: any shape and dtype, on any device; may be overwritten afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        # Copies to the CPU that do not block land in page-locked memory.
        self._values = values.to("cpu", non_blocking=True, copy=True)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The tensor on the CPU, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
