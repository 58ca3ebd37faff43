"""Small traces as torch.profiler writes them."""

import gzip
import json
from pathlib import Path

H100 = "NVIDIA H100 80GB HBM3"
MAIN, AUTOGRAD = 1, 2
"""threads"""


class TraceWriter:
    """Collects events; every kernel is launched by a 2 us call on a CPU thread."""

    def __init__(self, device: str = H100) -> None:
        self.events: list[dict] = []
        self.device = device

    def range(self, name: str, start: float, duration: float, *, thread: int = MAIN, **args):
        """An operation if its name has two colons, else an annotation."""
        category = "cpu_op" if "::" in name or name.startswith("triton_") else "user_annotation"
        self._add(category, name, start, duration, thread, args)

    def kernel(
        self, name: str, start: float, duration: float, *, launch: float, stream=7, thread=MAIN
    ):
        """A kernel and its launch."""
        correlation = len(self.events)
        arguments = {"correlation": correlation}
        self._add("cuda_runtime", "cudaLaunchKernel", launch, 2.0, thread, arguments)
        self._add("kernel", name, start, duration, stream, arguments)

    def wait(self, start: float, duration: float) -> None:
        """The CPU waits for the GPU."""
        self._add("cuda_runtime", "cudaStreamSynchronize", start, duration, MAIN, {})

    def memory(self, time: float, address: int, size: int, total: int, device_type: int = 1):
        """An allocation or a release."""
        values = {
            "Device Type": device_type,
            "Addr": address,
            "Bytes": size,
            "Total Allocated": total,
        }
        self.events.append({"ph": "i", "name": "[memory]", "ts": time, "args": values})

    def _add(self, category, name, start, duration, thread, args) -> None:
        event = {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}
        self.events.append({**event, "pid": 1, "tid": thread, "args": args})

    def write(self, path: Path, **header) -> Path:
        """Write it, gzipped if the name says so."""
        document = {
            "schemaVersion": 1,
            "deviceProperties": [{"id": 0, "name": self.device}],
            "traceEvents": self.events,
            **header,
        }
        content = json.dumps(document).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path


def shapes(*dims: list[int], kind: str = "c10::BFloat16", values: list[str] | None = None) -> dict:
    """Arguments of an operation: tensors, then scalars by value."""
    values = values or []
    return {
        "Input Dims": [*dims, *[[] for _ in values]],
        "Input type": [*[kind if d else "" for d in dims], *["Scalar" for _ in values]],
        "Concrete Inputs": [*["" for _ in dims], *values],
    }
