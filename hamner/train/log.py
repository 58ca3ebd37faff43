"""The log has the numbers on their way from the device to the host, and all that follows of them.

There is one queue. A step puts its loss, its gradient norm, what its routers did and what int8 lost
into it, as one copy behind the step's own work; the host looks at them once they are there, a step
later. From that one reading follow the interval's means in metrics.jsonl, the display, reporters,
spikes, bad steps, starved experts, operands that go back to bf16, the plan against reality.
"""

import math
from collections import deque
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from hamner.checkpoint.run_folder import RecordLog, RunFolder
from hamner.config.options import total_tokens
from hamner.plan.step_time import compare_with_reality, predict
from hamner.train import health
from hamner.train.beside import Beside
from hamner.train.display import Display
from hamner.train.health import StarvationDetector, StepHealth, StepReading
from hamner.train.int8_guard import Int8Guard
from hamner.train.metrics import Mfu, Record, Spike, Stopwatch, describe_routers, peak_vram_gib
from hamner.train.pictures import Pictures
from hamner.train.reporters import Reporter
from hamner.train.step import StepResult, TrainStep

MAX_PENDING = 1
"""steps that may still run when the host goes on: the GPU never runs out of work, and when a step's
numbers come in the clock shows the GPU's time, not that of a launch"""
PLAN_CHECK_STEP = 100
"""by then speed and memory are steady, and are compared with the plan"""


class AsyncCopy:
    """A copy of a tensor reaches the host behind the work that is queued on its device.

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
    def is_done(self) -> bool:
        """The answer is whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The method gives the tensor on the CPU, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


@dataclass(frozen=True)
class LogLine:
    """A log line says this beside what its steps came to."""

    val_loss: float | None
    val_step: int | None
    sources: dict[str, dict]


@dataclass
class PendingStep:
    """A pending step is one whose numbers are on their way from the device."""

    reading: StepReading
    """without loss and gradient norm; its batch is kept so that a bad one can be written down"""
    values: AsyncCopy
    """fp32: loss, gradient norm, `StepResult.router` and `StepResult.int8`, flat"""
    line: LogLine | None = None
    """the log line that ends with this step, if one does"""


@dataclass
class Interval:
    """An interval adds up, in fp32, the good steps since the last log line."""

    router_sum: Tensor
    """(layers, experts + 1), see `StepResult.router`; (0,) without a mixture"""
    start_step: int = 0
    start_tokens: int = 0
    start_seconds: float = 0.0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_steps: int = 0
    spikes: list[Spike] = field(default_factory=list)


class TrainLog:
    """The log owns the queue, the clock of training and what is said and written of every step.

    Args:
        run: the run's folder.
        train_step: whose steps are recorded; asked for its configuration, plan and device.
        display: for people.
    """

    def __init__(self, run: RunFolder, train_step: TrainStep, display: Display) -> None:
        self.run, self.train_step, self.display = run, train_step, display
        self.beside = Beside(display.message)
        self.config = config = train_step.config
        self.reporters: list[Reporter | Pictures] = []
        self.is_main = train_step.processes.rank.is_main
        compute = train_step.compute
        self.mfu = Mfu(config.model, config.seq_len, compute.gpu, compute.precision)
        self.metrics, self.samples = RecordLog(run.metrics), RecordLog(run.samples)
        self.watch = Stopwatch()
        self.health = StepHealth()
        self.queue: deque[PendingStep] = deque()
        self.last: StepReading | None = None
        self.skipped_steps = 0
        self.starvation = StarvationDetector(config.model) if config.model.is_moe else None
        self.int8_guard = Int8Guard(train_step.model.int8)
        router_sum = train_step.router_sum
        self.interval = Interval(torch.zeros((0,) if router_sum is None else router_sum.shape))
        self.is_before_first_line = True

    def start(self, step: int, tokens: int) -> None:
        """The clock and the first interval begin after `step`."""
        self.watch.start()
        self.interval.start_step, self.interval.start_tokens = step, tokens
        self.interval.start_seconds = self.watch.read()

    def record(self, launched: StepReading, result: StepResult) -> None:
        """A step that was launched joins the queue; those that have arrived are judged."""
        values = [result.loss[None], result.grad_norm[None]]
        values += [x.flatten() for x in (result.router, result.int8) if x is not None]
        self.queue.append(PendingStep(launched, AsyncCopy(torch.cat(values))))
        self.drain(max_pending=MAX_PENDING)

    def request_line(self, line: LogLine) -> None:
        """The interval ends with the last recorded step: its line is written once that arrives."""
        if self.queue:
            self.queue[-1].line = line
        else:
            self._write_line(line)

    def drain(self, *, max_pending: int = 0) -> None:
        """All steps but the last `max_pending`, and any that have arrived, are read and logged."""
        while self.queue and (len(self.queue) > max_pending or self.queue[0].values.is_done):
            pending = self.queue.popleft()
            self._read(pending)
            if pending.line is not None:
                self._write_line(pending.line)

    def flush(self) -> None:
        """All steps are read, and what the disk did not take of their records is tried again."""
        self.drain()
        for log in (self.metrics, self.samples):
            log.flush()

    def pause(self) -> None:
        """The clock stops when the steps under way are done: launched is not yet trained."""
        self.drain()
        self.watch.pause()

    def append(self, log: RecordLog, record: dict) -> None:
        """A record is written, or training goes on with a warning: the next one takes it along."""
        error = log.append(record) if self.is_main else None
        if error:
            self.display.message(
                f"WARNING: {log.path} cannot be written ({error.strerror}); "
                f"{len(log.waiting)} records wait"
            )

    def state_dict(self) -> dict:
        """The next start goes on with this, as JSON; the queue must be empty."""
        state = {
            "seconds": self.watch.read(),
            "skipped_steps": self.skipped_steps,
            "loss_sum": self.interval.loss_sum.item(),
            "loss_steps": self.interval.loss_steps,
            "spikes": [asdict(spike) for spike in self.interval.spikes],
            **self.health.state_dict(),
            **self.int8_guard.state_dict(),
        }
        if self.starvation:
            state["router_sum"] = self.interval.router_sum.tolist()
            state["starvation"] = self.starvation.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """The log goes on where `state_dict` was taken; older checkpoints have no spikes, and those
        of a mixture no state of its routers."""
        self.watch.seconds = state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self.interval.loss_sum = torch.tensor(float(state["loss_sum"]))
        self.interval.loss_steps = state["loss_steps"]
        self.interval.spikes = [Spike(**spike) for spike in state.get("spikes", [])]
        self.health.load_state_dict(state)
        self.int8_guard.load_state_dict(state)
        if self.starvation and "router_sum" in state:
            self.interval.router_sum = torch.tensor(state["router_sum"])
            self.starvation.load_state_dict(state["starvation"])

    def _read(self, pending: PendingStep) -> None:
        """A step's numbers are added up; a spike is marked, the batch of a bad step is kept."""
        values, interval = pending.values.wait(), self.interval
        loss, grad_norm = values[:2].tolist()
        self.last = reading = replace(pending.reading, loss=loss, grad_norm=grad_norm)
        score = self.health.judge(reading)
        if reading.is_bad:
            self.skipped_steps += 1
            if self.is_main:
                kept = health.keep(self.run.bad_steps, reading)
                self.display.message(
                    f"WARNING: step {reading.step:,} skipped: loss {loss}, gradient norm "
                    f"{grad_norm}; {kept}"
                )
            return
        interval.loss_sum += values[0]
        interval.loss_steps += 1
        router, int8 = values[2:].tensor_split([interval.router_sum.numel()])
        interval.router_sum += router.view_as(interval.router_sum)
        if len(int8) and (sentence := self.int8_guard.judge(reading.step, int8)):
            self.display.message(sentence)
        if score is not None:
            interval.spikes.append(Spike(reading.step, reading.tokens, loss, score))
            self.display.message(
                f"loss spike at step {reading.step:,}: {loss:.4f}, {score:.1f} robust "
                "standard deviations above the recent losses"
            )

    def _write_line(self, line: LogLine) -> None:
        """The line is written, shown and reported, and the next interval begins."""
        last, interval, seconds = self.last, self.interval, self.watch.read()
        elapsed = max(1e-9, seconds - interval.start_seconds)
        speed = (last.tokens - interval.start_tokens) / elapsed
        steps = interval.loss_steps
        record = Record(
            step=last.step,
            tokens=last.tokens,
            loss=interval.loss_sum.item() / steps if steps else math.nan,
            lr=last.lr,
            grad_norm=last.grad_norm,
            tokens_per_second=speed,
            mfu=self.mfu(speed / self.train_step.processes.rank.world_size),
            peak_vram_gib=peak_vram_gib(self.train_step.compute.device),
            seconds=seconds,
            skipped_steps=self.skipped_steps,
            router=describe_routers(interval.router_sum, steps) if self.starvation else None,
            int8=self.int8_guard.describe(),
            spikes=tuple(interval.spikes),
            **vars(line),
        )
        self.is_before_first_line = False
        self.append(self.metrics, record.to_json())
        for reporter in self.reporters:
            with self.beside(type(reporter).__name__):
                reporter.report(record)
        self.display.show(record)
        self._warn_of_starved_experts(record, steps)
        if interval.start_step < PLAN_CHECK_STEP <= record.step:
            with self.beside("the comparison with the plan"):
                self._compare_with_plan(record)
        fresh = torch.zeros_like(interval.router_sum)
        self.interval = Interval(fresh, record.step, record.tokens, seconds)

    def _warn_of_starved_experts(self, record: Record, steps: int) -> None:
        """Experts of a mixture that get next to nothing are named, each once."""
        if record.router is None:
            return
        model = self.config.model
        advice = (
            "raise --router-bias-update-speed"
            if model.router_balance == "bias"
            else "raise --router-aux-loss-coef, or start a run with --router-balance bias"
        )
        for layer, expert, load in self.starvation.starved(record.router["load"], steps):
            self.display.message(
                f"WARNING: layer {layer}: expert {expert} gets "
                f"{load:.1%} of the assignments, under a quarter of its fair share "
                f"({1 / model.num_experts:.1%}), for {self.starvation.STEPS} steps by now; {advice}"
            )

    def _compare_with_plan(self, record: Record) -> None:
        """The projection for this GPU is held against the run, for the Triton kernels only."""
        step, world_size = self.train_step, self.train_step.processes.rank.world_size
        if step.compute.gpu is None or step.compute.kernels != "triton" or world_size > 1:
            return
        plan = step.plan
        prediction = predict(self.config, step.compute.gpu, plan.policies, plan.micro_batch_size)
        speed, peak = record.tokens_per_second, record.peak_vram_gib
        line = compare_with_reality(prediction, speed, peak, total_tokens(self.config))
        self.display.message(f"plan: {line}")
        measured = {"tokens_per_second": speed, "peak_gib": peak}
        projected = {name: getattr(prediction, name) for name in measured}
        interval = prediction.interval
        projected["tokens_per_second_interval"] = [interval.low, interval.high]
        row = {"step": record.step, "projected": projected, "measured": measured}
        self.append(RecordLog(self.run.plan), row)
