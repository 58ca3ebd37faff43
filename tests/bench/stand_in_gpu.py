"""A process compiles for an H200 whose driver takes kernels and does nothing."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.kills import CONTEXT


class Driver:
    """Triton's driver, as far as a launch needs it."""

    def __init__(self):
        self.binaries, self.shared = [], []
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            unload_module=lambda module: None,
        )

    def load_binary(self, name, binary, shared, device):
        self.binaries.append(binary)
        self.shared.append(shared)
        return len(self.binaries), 1, 32, 0, 1024

    def launcher_cls(self, src, metadata):
        return lambda *arguments: None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def on_h200(check: Callable[[Driver], None]) -> None:
    """Run a check, a function of a module, with such a driver.

    It has a process of its own: a launch in Triton's interpreter leaves parts of the language
    exchanged, and nothing compiles in that process again.
    """
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        pool.submit(_with_driver, check).result()


def _with_driver(check: Callable[[Driver], None]) -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        shared_memory_per_multiprocessor=233_472
    )
    check(driver)
