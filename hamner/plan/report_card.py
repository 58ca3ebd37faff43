"""A report card is what one GPU reached, measured by `python -m bench.report_card`.

It is a JSON file that its owner can attach to an issue, and that `hamner.plan --report-card` plans
with. Torch-free.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hamner.errors import UserError
from hamner.files import read_json, refuse_pipe, write_whole

FORMAT = 2
"""number of the layout of the file; another layout is another number"""


@dataclass(frozen=True)
class Device:
    """A device is one physical GPU under one driver, with the limits that it ran under."""

    gpu: str
    """the driver's name for it"""
    capability: tuple[int, int]
    """compute capability of the GPU"""
    compiled_for: tuple[int, int]
    """compute capability that the kernels were compiled for: another one under --as-capability"""
    driver: str
    torch: str
    triton: str
    memory_bytes: int
    power_limit_w: float | None
    """None here and below: the driver did not say"""
    max_clock_mhz: float | None
    """highest clock of the multiprocessors that the driver allows"""
    load_clock_mhz: float | None
    """median of that clock while option a trained or, where it does not, in matmuls of 8192^3"""


@dataclass(frozen=True)
class MatmulRate:
    """A rate is of one bf16 matmul (m, k) x (k, n) of torch, accumulated in fp32."""

    m: int
    k: int
    n: int
    tflops: float
    """of one call after the other in a CUDA graph, the gaps between them included, as below"""


@dataclass(frozen=True)
class AttentionRate:
    """A rate is of Hamner's causal attention in bf16, half of the square counted.

    Forward is two products, backward five (`hamner.plan.costs.attention`).
    """

    seq_len: int
    head_size: int
    direction: Literal["forward", "backward"]
    milliseconds: float
    """of a call"""
    tflops: float


@dataclass(frozen=True)
class KernelTime:
    """A time is of one kernel, or of the few that make one operation, at one shape."""

    name: str
    shape: str
    """for a reader, such as 24576 x 1024"""
    kind: str
    """what the step model calls such work (`hamner.plan.step_time.Op.kind`), such as norm, swiglu,
    rope, loss, optimizer, routing or matmul_grouped; empty where it has no such kind"""
    flops: float
    """by `hamner.plan.costs`, as the bytes"""
    bytes: float
    launches: int
    """as the step model counts them"""
    measured_ms: float
    floor_ms: float
    """at the card's peak and its full bandwidth"""
    predicted_ms: float | None
    """by the step model without this report card; None where it has no such kind"""


@dataclass(frozen=True)
class StepMeasurement:
    """A measurement is of option a at its defaults, beside what was projected before it ran."""

    steps: int
    """timed ones"""
    tokens_per_second: float
    """median"""
    tokens_per_second_p10: float
    tokens_per_second_p90: float
    peak_bytes: int
    """of memory, as torch allocated it"""
    recompute: str
    """as `--recompute`, with the next what fitted the free memory"""
    micro_batch_size: int
    attention: str
    """whose kernels, as `--attention`"""
    projected_low: float
    """tokens/s, as the next two"""
    projected: float
    projected_high: float
    projected_peak_bytes: int


@dataclass(frozen=True)
class ReportCard:
    """A report card is of one session on one GPU."""

    date: str
    """as 2026-11-29"""
    commit: str
    """of Hamner"""
    device: Device
    bandwidth_gbs: float
    """of a large copy, bytes read and written (10^9) a second"""
    matmuls: tuple[MatmulRate, ...]
    attention: tuple[AttentionRate, ...]
    kernels: tuple[KernelTime, ...]
    step: StepMeasurement | None
    """None where option a was not trained"""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """The card is written as one JSON object.

        Raises:
            OSError: the disk does not take it.
            ValueError: a number is not finite.
        """
        write_whole(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "ReportCard":
        """The card is read back, every field of it checked.

        Raises:
            UserError: the file is not a report card of this format, or damaged.
        """
        again = "make it again with python -m bench.report_card"
        refuse_pipe(path, f"--report-card {path}")
        values = read_json(path, _Unreadable)
        if not {"format", "device", "matmuls"} <= values.keys():
            raise UserError(f"--report-card {path} is not a report card: {again}")
        if values["format"] != FORMAT:
            raise UserError(
                f"--report-card {path} has format {values['format']!r}, this version reads "
                f"{FORMAT}: {again}"
            )
        try:
            card = _decode(cls, values, "")
            card._check_rates()
        except ValueError as error:
            raise UserError(f"--report-card {path} is damaged, {error}: {again}") from None
        return card

    def _check_rates(self) -> None:
        """A rate that is missing or 0, which nothing could be divided by, is a ValueError, and so
        are percentiles out of order."""
        measured = {
            "bandwidth_gbs": [self.bandwidth_gbs],
            "device.memory_bytes": [self.device.memory_bytes],
            "matmuls": [value for rate in self.matmuls for value in asdict(rate).values()],
            "attention": [v for r in self.attention for v in (r.tflops, r.milliseconds, r.seq_len)],
            "kernels": [kernel.measured_ms for kernel in self.kernels],
        }
        if self.step:
            speeds = [value for name, value in asdict(self.step).items() if "tokens_per_s" in name]
            measured["step"] = [*speeds, self.step.micro_batch_size, self.step.steps]
        for name, values in measured.items():
            if not values:
                raise ValueError(f"{name} is empty")
            if not all(values):
                raise ValueError(f"{name} has a 0")
        if step := self.step:
            p10, p90 = step.tokens_per_second_p10, step.tokens_per_second_p90
            if not p10 <= step.tokens_per_second <= p90:
                raise ValueError("step has a median that is not between p10 and p90")


class _Unreadable(UserError):
    """The error names the flag before the file, and which file it should be."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"--report-card {message}; give the report_card.json that python -m bench.report_card "
            "wrote"
        )


def _decode(wanted: Any, value: Any, where: str) -> Any:
    """The function makes `wanted` of what JSON holds, or says in a ValueError what is wrong."""
    if is_dataclass(wanted):
        return _decode_fields(wanted, value, where)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is UnionType:
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(inner, value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        if arguments[1:] == (...,):
            arguments = arguments[:1] * len(value)
        if len(arguments) == len(value):
            pairs = enumerate(zip(arguments, value, strict=True))
            return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)
    # It comes from a stranger and goes to a terminal, which control characters steer.
    if wanted is str and isinstance(value, str) and value.isprintable():
        return value
    is_number = isinstance(value, int) if wanted is int else isinstance(value, (int, float))
    if wanted in (int, float) and is_number and not isinstance(value, bool) and _is_usual(value):
        return value
    raise ValueError(f"{where} is {json.dumps(value)[:40]}")


def _is_usual(value: float) -> bool:
    """The limits are before what no float can hold once it is divided; NaN is not between them."""
    return value == 0 or 1e-30 <= value <= 1e30


def _decode_fields(wanted: Any, value: Any, where: str) -> Any:
    """Every field must be there; those that this version does not know are passed over."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {json.dumps(value)[:40]}")
    types, decoded = get_type_hints(wanted), {}
    for field in fields(wanted):
        name = f"{where}.{field.name}".lstrip(".")
        if field.name not in value:
            raise ValueError(f"{name} is missing")
        decoded[field.name] = _decode(types[field.name], value[field.name], name)
    return wanted(**decoded)
