"""The training loop: build, resume, then step, log, evaluate, sample, save.

Nothing in a step waits for the GPU: losses, the gradient norm and the skip of a bad step stay on
the device and are read back behind it, so that log lines come a step late and the GPU never runs
out of work; the number of kept targets is counted on the CPU before a batch leaves.

What a long run must survive lives beside the loop: `background_save` (checkpoints that may fail and
are tried again), `step_monitor` (bad steps and spikes), `bad_steps` (batches kept for replay),
`watchdog` (hangs), `resume` (what may change between two starts). Of several processes each runs
this loop in step with the others: `hamner.parallel` has all that differs.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import hamner
from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.run_folder import RecordLog, RunFolder
from hamner.checkpoint.writer import RETRY_SECONDS
from hamner.config.train import TrainConfig
from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.data.validation import ValidationSet
from hamner.errors import UserError
from hamner.hardware import GIB
from hamner.model.generate import PROMPTS, generate
from hamner.model.transformer import RouterStatistics
from hamner.parallel.device import cap_memory
from hamner.parallel.processes import SingleProcess, open_processes
from hamner.parallel.tensors import local
from hamner.plan.memory import MemoryPlan
from hamner.plan.step_time import compare_with_reality, predict
from hamner.train import announcements, bad_steps, plots, resume, setup
from hamner.train.cuda_graph import GraphedBackward
from hamner.train.display import Display
from hamner.train.early_stopping import EarlyStopping
from hamner.train.interrupt import Interrupt
from hamner.train.metrics import Mfu, Record, Spike, Stopwatch, peak_vram_gib
from hamner.train.optimizer import AdamW, Schedule
from hamner.train.readback import Readback
from hamner.train.reporters import open_reporters, require_installed
from hamner.train.router_monitor import RouterMonitor, StarvationDetector, describe_routers
from hamner.train.setup import choose, open_saver
from hamner.train.step_monitor import MOST_UNDER_WAY, SpikeDetector, StepMonitor, StepReading
from hamner.train.watchdog import Watchdog

PATIENCE_SECONDS = 10.0
"""longest an interrupted step is finished; a slower one is dropped and comes again on resume"""
EVALUATION_TOKENS = 2_048
"""of one forward pass of an evaluation"""
FIRST_STEPS = 5
"""of a start, in which running out of memory changes the plan"""
STEP_DOWN = 0.9
"""of the planned memory, after that"""
PLAN_CHECK_STEP = 100
"""by then speed and memory are steady, and are compared with the plan"""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    tokens: int
    val_loss: float | None
    """of the last evaluation, nats per token"""
    checkpoint: Path | None
    interrupted: bool
    diagnosis: str | None = None
    """why the run stopped itself, or None"""


class Loader(Protocol):
    """Endless training batches that resume exactly; see `hamner.data.loader.TrainLoader`."""

    def next_batch(self, is_stopped: Callable[[], bool]) -> Batch | None: ...

    def progress(self) -> dict[str, dict]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RunData:
    """What a run trains and is evaluated on."""

    loader: Loader
    validation: Batch
    keep: Callable[[], None] = lambda: None
    """called once the run's folder is there: writes what the next start need not gather again"""


OpenData = Callable[[TrainConfig, Tokenizer, bool], RunData]
"""(config, tokenizer, whether to pin memory) -> what to train on"""


def open_documents(config: TrainConfig, tokenizer: Tokenizer, pin_memory: bool) -> RunData:
    """The data of pre-training; see `OpenData`."""
    data = DataConfig(
        specs=config.data,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        val_fraction=config.val_fraction,
    )
    loader = TrainLoader(data, tokenizer, pin_memory=pin_memory)
    validation = ValidationSet(RunFolder(config.folder).validation, loader, config.eval_tokens)
    return RunData(loader, validation.rows, validation.keep)


def train(
    config: TrainConfig,
    open_data: OpenData = open_documents,
    initial: Checkpoint | None = None,
) -> TrainResult:
    """Train as `config` says, from the start or from the newest checkpoint.

    Args:
        config: resolved flags.
        open_data: what to train on.
        initial: whose weights to start from; default random ones.

    Raises:
        UserError: the configuration, the data or the run folder does not allow it; nothing is
            written before all three were read.
    """
    run = RunFolder(config.folder)
    with open_processes(config) as processes:
        processes.from_main(lambda: run.check(resume=config.resume))
        trainer = Trainer(config, run, open_data, initial, processes)
        try:
            return trainer.run_to_end()
        finally:
            trainer.close()


@dataclass(frozen=True)
class LogLine:
    """A log line whose numbers are on their way from the device."""

    step: int
    tokens: int
    val_loss: float | None
    val_step: int | None
    lr: float
    sources: dict[str, dict]
    sums: Readback
    """loss_sum, loss_steps, skipped and the gradient norm"""
    router_sum: Readback | None


class Trainer:
    """One start of a run: everything it needs, built once, and the loop.

    Args:
        config: resolved flags.
        run: the run's folder, checked.
        open_data: what to train on.
        initial: whose weights to start from; default random ones.
        processes: that train together; default this one alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        open_data: OpenData = open_documents,
        initial: Checkpoint | None = None,
        processes: SingleProcess | None = None,
    ) -> None:
        require_installed(config.report_to)
        self.config, self.run = config, run
        self.processes = processes or SingleProcess()
        self.is_main = self.processes.rank.is_main
        self.world_size = self.processes.rank.world_size
        self.tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
        setup = choose(config, self.processes)
        self.compute, self.plan, self.attention = setup.compute, setup.plan, setup.attention
        self.engine, self.records_graph = setup.engine, setup.records_graph
        cap_memory(setup.compute, config)
        compute = self.compute
        pin_memory = compute.device.type == "cuda"
        data = open_data(config, self.tokenizer, pin_memory)
        self.loader, self.validation = data.loader, data.validation

        self.model = setup.model(config, initial)
        self.optimizer = AdamW(
            self.model,
            self.model.ops,
            dtype=self.engine.parameter_dtype(compute.dtype),
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            engine=self.engine,
        )
        self.forward = self.engine.wrap(self.model, self.optimizer)
        if config.compile:
            self.forward = torch.compile(self.forward)
        self.micro_step = self.build_micro_step()
        self.stepped_down = False
        self.schedule = Schedule(
            config.lr,
            config.min_lr,
            config.warmup_steps * config.tokens_per_step,
            config.total_tokens,
        )
        self.mfu = Mfu(config.model, config.seq_len, compute.gpu, compute.precision)

        self.step = self.tokens = 0
        self.watch = Stopwatch(0.0)
        self.val_loss: float | None = None
        self.val_step: int | None = None
        self.early_stopping = EarlyStopping(config.patience)
        # On the device, read only when a line is logged.
        self.loss_sum = torch.zeros((), device=compute.device)
        self.loss_steps = torch.zeros((), dtype=torch.int64, device=compute.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=compute.device)
        self.step_loss = torch.zeros((), device=compute.device)
        is_moe = config.model.is_moe
        self.routers = RouterMonitor(config.model, compute.device) if is_moe else None
        self.starvation = StarvationDetector(config.model) if is_moe else None

        self.monitor = StepMonitor()
        self.log_lines: deque[LogLine] = deque()
        """begun, and not written yet"""
        self.spike_detector = SpikeDetector([])
        self.spikes: list[Spike] = []
        self.bad_in_a_row = 0
        self.hopeless: StepReading | None = None
        """the bad step after which the run stops"""
        self.diagnosis: str | None = None
        self.poisoned: list[str] = []
        """tensors that were found not to be finite then"""
        self.position = self.loader.state_dict()
        """of the data, after the last finished step"""
        self.saved: Checkpoint | None = None
        self.notes: list[str] = []
        """to say once the display is there"""
        if config.resume:
            self.restore()
        self.processes.from_main(lambda: run.start(config))
        self.processes.open_log(run.logs)
        if self.is_main:
            data.keep()
        self.metrics, self.samples = RecordLog(run.metrics), RecordLog(run.samples)
        self.saver = open_saver(
            self.engine,
            run.checkpoints,
            keep=config.keep,
            keep_every=config.keep_every,
            records=(run.metrics, run.samples),
        )
        stacks = run.stacks_of(self.processes.rank)
        self.watchdog = Watchdog(config.hang_minutes, stacks, self.report_hang)
        self.reporters = open_reporters(config) if self.is_main else []
        budget_gib = None if compute.device.type == "cpu" else compute.budget_bytes / GIB
        self.display = Display(
            f"hamner {config.option}",
            self.schedule.total_tokens,
            budget_gib,
            *self.processes.consoles(),
        )

    def build_micro_step(self) -> Callable:
        """Forward and backward of a micro-batch, recorded where that is possible."""
        if self.records_graph:
            return GraphedBackward(
                self.forward_backward,
                self.model.parameters(),
                warm_up_calls=self.engine.warm_up_calls,
            )
        return self.forward_backward

    def close(self) -> None:
        """Stop what runs beside the loop."""
        # NCCL does not let go of a communicator before the graphs that were recorded with it.
        self.micro_step = self.forward_backward
        self.saver.close()
        self.loader.close()
        for reporter in self.reporters:
            reporter.close()

    def run_to_end(self) -> TrainResult:
        """Train until the run's length, `--stop-after`, an interrupt or a diagnosis; then save."""
        config = self.config
        first_step = self.step
        with self.display, Interrupt(is_alone=self.world_size == 1) as interrupt, self.watchdog:
            for line in [*announcements.introduction(self), *self.notes]:
                self.display.message(line)
            self.watch.start()
            self.mark_interval(self.step, self.tokens, self.watch.read())
            while not self.finished:
                batch = self.next_batch(interrupt)
                if batch is None:
                    break
                lr = self.schedule(self.tokens + batch.inputs.numel())
                norm = self.fitting_step(batch, lr, interrupt, self.step - first_step)
                if norm is None:
                    break
                self.finish_step(batch, lr, norm)
                done = self.tokens >= self.schedule.total_tokens
                is_better = False
                if due(self.step, config.eval_every) or (done and config.eval_every):
                    self.evaluate()
                    self.log(lr, norm)
                    is_better = self.early_stopping.improved(self.step, self.val_loss)
                elif due(self.step, config.log_every) or done:
                    self.log(lr, norm)
                if is_better:
                    self.save_best()
                self.save_when_due(due(self.step, config.save_every) and not done)
                if due(self.step, config.sample_every) or (done and config.sample_every):
                    self.sample()
                if config.stop_after and self.step - first_step >= config.stop_after:
                    break
            self.pause_watch()
            if self.hopeless:
                self.diagnose(self.hopeless)
            interrupted = self.processes.any(interrupt.requested)
            self.save_last()
            if self.is_main:
                self.draw()
                for line in announcements.conclusion(self, interrupted):
                    self.display.message(line)
        return TrainResult(
            step=self.step,
            tokens=self.tokens,
            val_loss=self.val_loss,
            checkpoint=self.saved.path if self.saved else None,
            # Asked again: it may have come during the last save.
            interrupted=self.processes.any(interrupt.requested),
            diagnosis=self.diagnosis,
        )

    @property
    def finished(self) -> bool:
        """Whether the run has its length or stopped improving."""
        return self.tokens >= self.schedule.total_tokens or self.early_stopping.exhausted

    def next_batch(self, interrupt: Interrupt) -> Batch | None:
        """The next batch; None, in all processes, once one is interrupted or has lost hope.

        If the data fails, what was trained is saved.
        """
        batch = failure = None
        try:
            with self.watchdog.waiting():
                if not self.hopeless:
                    batch = self.loader.next_batch(lambda: interrupt.requested)
        except Exception as error:
            failure = error
        stops, fails = self.processes.all_reduce_max([batch is None, failure is not None])
        if fails and self.step:
            self.save_last()
        if failure:
            raise failure
        return None if stops else batch

    def finish_step(self, batch: Batch, lr: float, norm: Tensor) -> None:
        """Count a step, and look at those whose numbers have come in."""
        self.position = self.loader.state_dict()
        self.step += 1
        self.tokens += batch.inputs.numel()
        self.watchdog.beat()
        self.processes.step_done(self.step)
        self.monitor.record(self.step, self.tokens, lr, batch, self.step_loss, norm)
        self.judge_steps()

    def fitting_step(
        self, batch: Batch, lr: float, interrupt: Interrupt, steps_so_far: int
    ) -> Tensor | None:
        """`train_step`, which early in a start may run out of memory once: then it needs less.

        Raises:
            UserError: it does not fit, what was trained is saved.
        """
        updates = self.optimizer.steps
        while True:
            try:
                return self.train_step(batch, lr, interrupt)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            # Out of the handler, whose error would keep the step's activations alive.
            unchanged = self.optimizer.steps == updates
            if not (unchanged and steps_so_far < FIRST_STEPS and self.step_down(reason)):
                break
        self.optimizer.drop_gradients()
        if self.step and unchanged and self.world_size == 1:
            self.save_last()
        raise UserError(
            f"step {self.step + 1:,} does not fit ({reason}): free the memory other programs hold, "
            "lower --micro-batch-size or --vram-budget, or recompute more (--recompute full)"
        )

    def step_down(self, reason: str) -> bool:
        """Plan for a tenth less memory, once; whether there is such a plan.

        Not with several processes: the others are half-way through the step.
        """
        if self.stepped_down or self.world_size > 1:
            return False
        self.stepped_down = True
        budget = int(STEP_DOWN * self.plan.account.total)
        try:
            plan = setup.plan_memory(self.config, self.compute, budget=budget)
        except UserError:
            return False
        if plan.account.total > budget:
            return False
        self.display.message(
            f"WARNING: {reason}. Other programs, or memory in pieces, leave less than was planned "
            f"with; going on with {plan}"
        )
        self.follow(plan)
        return True

    def follow(self, plan: MemoryPlan) -> None:
        """Train by another plan from the next step on."""
        self.plan = plan
        self.optimizer.drop_gradients()
        self.model.policies = plan.policies
        self.micro_step = self.build_micro_step()
        if self.compute.device.type == "cuda":
            torch.cuda.empty_cache()

    def train_step(self, batch: Batch, lr: float, interrupt: Interrupt) -> Tensor | None:
        """Forward, backward and update on one global batch, in micro-batches.

        Each micro-batch's mean loss is weighted by its share of the step's kept targets, so the
        step does not depend on how it is cut, nor on how many processes its micro-batches are
        dealt to.

        Returns:
            The gradient norm before clipping, 0-d on the device; None if an interrupt made the
            step be dropped because the rest of it would have taken too long.
        """
        size = self.plan.micro_batch_size
        starts = range(0, len(batch.inputs), size)
        all_kept = int((batch.targets != IGNORED_TARGET).sum())
        starts = self.processes.share(starts)
        started = time.perf_counter()
        loss = torch.zeros((), device=self.compute.device)
        if self.routers:
            self.routers.begin_step()
        for number, start in enumerate(starts):
            rows, is_last = slice(start, start + size), number == len(starts) - 1
            kept = int((batch.targets[rows] != IGNORED_TARGET).sum())
            share = torch.full((), kept / max(1, all_kept), device=self.compute.device)
            with self.engine.micro_batch(is_last=is_last):
                cross_entropy, router = self.micro_step(*self.to_device(batch, rows), share)
            loss += cross_entropy * share
            if self.routers:
                self.routers.add(router, len(batch.inputs[rows]) / len(batch.inputs))
            if len(starts) > 1:
                self.engine.accumulate(self.optimizer, is_last=is_last)
            if self.step == 0 and number == 0 and self.compute.device.type == "cpu":
                speed = (
                    self.world_size * size * self.config.seq_len / (time.perf_counter() - started)
                )
                self.display.message(announcements.cpu_speed(speed, self.schedule.total_tokens))
            left = (time.perf_counter() - started) / (number + 1) * (len(starts) - number - 1)
            if self.processes.any(interrupt.requested and left > PATIENCE_SECONDS):
                self.optimizer.drop_gradients()
                return None
        self.processes.sum_(loss)
        if self.routers:
            self.processes.sum_(self.routers.step_sum)
        norm = self.optimizer.step(lr, loss)
        is_good = torch.isfinite(norm)
        self.loss_sum += torch.where(is_good, loss, 0.0)
        self.loss_steps += is_good
        self.skipped += ~is_good
        self.step_loss = loss
        if self.routers:
            self.routers.end_step(is_good)
            if self.config.model.router_balance == "bias":
                self.model.balance_routers(self.routers.step_load, is_good)
        return norm

    def forward_backward(
        self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None, share: Tensor
    ) -> tuple[Tensor, RouterStatistics | None]:
        """Leave the gradients of `share` of a micro-batch's mean loss in the parameters.

        Returns:
            The micro-batch's mean cross-entropy, 0-d, and what its routers did.
        """
        output = self.forward(inputs, targets, document_ids)
        self.engine.backward(output.loss * share)
        router = output.router and RouterStatistics(*(x.detach() for x in output.router))
        return output.cross_entropy.detach(), router

    def to_device(self, batch: Batch, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and, if documents are kept apart, document ids of some rows."""
        target = self.compute.device
        documents = batch.document_ids[rows] if self.config.document_mask else None
        return (
            batch.inputs[rows].to(target, non_blocking=True),
            batch.targets[rows].to(target, non_blocking=True),
            None if documents is None else documents.to(target, non_blocking=True),
        )

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean cross-entropy over the validation rows."""
        self.pause_watch()
        # In small pieces: a step's memory may be reserved by its CUDA graph at the same time.
        rows = len(self.validation.inputs)
        size = max(1, min(self.plan.micro_batch_size, EVALUATION_TOKENS // self.config.seq_len))
        if rows:
            total = torch.zeros((), device=self.compute.device)
            # As many pieces for every process: of those beyond the last row nothing is kept.
            pieces = math.ceil(math.ceil(rows / size) / self.world_size) * self.world_size
            with self.engine.inference(self.model):
                for start in self.processes.share(range(0, pieces * size, size)):
                    part = slice(min(start, rows - 1), start + size)
                    kept = int((self.validation.targets[start : part.stop] != IGNORED_TARGET).sum())
                    output = self.model(*self.to_device(self.validation, part))
                    total += output.cross_entropy * kept
            self.processes.sum_(total)
            kept = int((self.validation.targets != IGNORED_TARGET).sum())
            self.val_loss, self.val_step = total.item() / max(1, kept), self.step
        self.watch.start()

    def log(self, lr: float, norm: Tensor) -> None:
        """Begin a log line: it is written once the numbers of its step have come in."""
        sums = torch.stack(
            [x.double() for x in (self.loss_sum, self.loss_steps, self.skipped, norm)]
        )
        line = LogLine(
            step=self.step,
            tokens=self.tokens,
            val_loss=self.val_loss,
            val_step=self.val_step,
            lr=lr,
            sources=self.loader.progress(),
            sums=Readback(sums),
            router_sum=self.routers and self.routers.end_interval(),
        )
        self.log_lines.append(line)
        self.loss_sum.zero_()
        self.loss_steps.zero_()
        if not self.monitor.under_way:
            self.write_log_line()

    def write_log_line(self) -> None:
        """Write, show and report the oldest line begun, now that its step is done."""
        line = self.log_lines.popleft()
        loss_sum, steps, skipped, norm = line.sums.wait().tolist()
        seconds = self.watch.read()
        speed = (line.tokens - self.interval_tokens) / max(1e-9, seconds - self.interval_seconds)
        record = Record(
            step=line.step,
            tokens=line.tokens,
            loss=loss_sum / steps if steps else math.nan,
            val_loss=line.val_loss,
            val_step=line.val_step,
            lr=line.lr,
            grad_norm=norm,
            tokens_per_second=speed,
            mfu=self.mfu(speed / self.world_size),
            peak_vram_gib=peak_vram_gib(self.compute.device),
            seconds=seconds,
            skipped_steps=int(skipped),
            sources=line.sources,
            router=line.router_sum and describe_routers(line.router_sum.wait(), int(steps)),
            spikes=tuple(self.spikes),
        )
        self.append(self.metrics, record.to_json())
        for reporter in self.reporters:
            try:
                reporter.report(record)
            except Exception as error:  # whatever ails a service, the run does not end of it
                self.display.message(f"WARNING: {type(reporter).__name__} failed: {error}")
        self.display.show(record)
        self.warn_of_starved_experts(record, int(steps))
        if self.interval_start < PLAN_CHECK_STEP <= record.step:
            self.compare_with_plan(record)
        self.spikes.clear()
        self.mark_interval(record.step, record.tokens, seconds)

    def warn_of_starved_experts(self, record: Record, steps: int) -> None:
        """Say which experts of a mixture get next to nothing, each once."""
        if record.router is None:
            return
        for starved in self.starvation.starved(record.router["load"], steps):
            self.display.message(
                f"WARNING: layer {starved.layer}: expert {starved.expert} gets "
                f"{starved.load:.1%} of the assignments, under a quarter of its fair share "
                f"({1 / self.config.model.num_experts:.1%}), for {self.starvation.STEPS} steps "
                f"by now; {self.balance_advice}"
            )

    @property
    def balance_advice(self) -> str:
        """How to even out the experts' load."""
        if self.config.model.router_balance == "bias":
            return "raise --router-bias-update-speed"
        return "raise --router-aux-loss-coef, or start a run with --router-balance bias"

    def pause_watch(self) -> None:
        """Stop the clock when the steps under way are done: what is launched is not yet trained."""
        self.judge_steps(most_under_way=0)
        self.watch.pause()

    def mark_interval(self, step: int, tokens: int, seconds: float) -> None:
        """Start the interval the next log line is about, after `step`."""
        self.interval_start, self.interval_tokens, self.interval_seconds = step, tokens, seconds

    def compare_with_plan(self, record: Record) -> None:
        """Say and keep how far the projection for this GPU was off; for the kernels only."""
        if self.compute.gpu is None or self.compute.kernels != "triton" or self.world_size > 1:
            return
        prediction = predict(
            self.config.model,
            self.compute.gpu,
            policies=self.plan.policies,
            micro_batch_size=self.plan.micro_batch_size,
            batch_size=self.config.batch_size,
            seq_len=self.config.seq_len,
        )
        speed, peak = record.tokens_per_second, record.peak_vram_gib
        line = compare_with_reality(prediction, speed, peak, self.config.total_tokens)
        self.display.message(f"plan: {line}")
        self.append(
            RecordLog(self.run.plan),
            {
                "step": record.step,
                "projected": {
                    "tokens_per_second": prediction.tokens_per_second,
                    "peak_gib": prediction.peak_gib,
                },
                "measured": {"tokens_per_second": speed, "peak_gib": peak},
            },
        )

    def append(self, log: RecordLog, record: dict) -> None:
        """Write a record, or go on training with a warning: the next one takes it along."""
        error = log.append(record) if self.is_main else None
        if error:
            self.display.message(
                f"WARNING: {log.path} cannot be written ({error.strerror}); "
                f"{len(log.waiting)} records wait"
            )

    def sample(self) -> None:
        """Continue the fixed prompts and keep the texts."""
        self.pause_watch()
        for prompt in PROMPTS:
            with self.engine.inference(self.model):
                text = generate(self.model, self.tokenizer, prompt, seed=self.config.seed)
            record = {"step": self.step, "tokens": self.tokens, "prompt": prompt, "text": text}
            self.append(self.samples, record)
            self.display.message(f"sample: {prompt}{text}".replace("\n", " "))
        self.watch.start()

    def judge_steps(self, *, most_under_way: int = MOST_UNDER_WAY) -> None:
        """Judge the steps whose numbers have come in, and write the log lines they complete.

        Args:
            most_under_way: steps whose numbers may still be missing; waits for those before.
        """
        for reading in self.monitor.arrived(most_under_way=most_under_way):
            self.judge(reading)
            if self.log_lines and self.log_lines[0].step == reading.step:
                self.write_log_line()

    def judge(self, reading: StepReading) -> None:
        """Mark a spike, keep the batch of a bad step, and stop after too many in a row."""
        if not reading.is_bad:
            self.bad_in_a_row = 0
            score = self.spike_detector.score(reading.loss)
            if score is not None:
                spike = Spike(reading.step, reading.tokens, reading.loss, score)
                self.spikes.append(spike)
                self.display.message(
                    f"loss spike at step {spike.step:,}: {spike.loss:.4f}, {score:.1f} robust "
                    "standard deviations above the recent losses"
                )
            return
        self.bad_in_a_row += 1
        if self.bad_in_a_row == bad_steps.MOST_IN_A_ROW:
            self.hopeless = reading
        if self.is_main:
            kept = bad_steps.keep(self.run.bad_steps, reading)
            self.display.message(
                f"WARNING: step {reading.step:,} skipped: loss {reading.loss}, gradient norm "
                f"{reading.grad_norm}; {kept}"
            )

    def diagnose(self, last: StepReading) -> None:
        """Find out why step after step was bad, `last` the last of them."""
        state = {**self.optimizer.parameters, **self.optimizer.state_tensors()}
        bad = bad_steps.not_finite({name: local(tensor) for name, tensor in state.items()})
        is_bad = self.processes.all_reduce_max([name in bad for name in state])
        self.poisoned = [name for name, flag in zip(state, is_bad, strict=True) if flag]
        self.diagnosis = bad_steps.diagnose(last, self.poisoned)

    def save(self) -> None:
        """Start to write a checkpoint of the last finished step."""
        if self.log_lines:  # of steps up to this one: a resume would not write them again
            self.judge_steps(most_under_way=0)
        for log in (self.metrics, self.samples):
            log.flush()
        self.saver.begin(
            self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_tensors(),
            counters={
                "skipped_steps": self.skipped,
                "loss_sum": self.loss_sum,
                "loss_steps": self.loss_steps,
                **({"router_sum": self.routers.interval_sum} if self.routers else {}),
            },
            state={
                "format": resume.STATE_FORMAT,
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.watch.read(),
                "optimizer_steps": self.optimizer.steps,
                "val_loss": self.val_loss,
                "val_step": self.val_step,
                "recent_losses": list(self.spike_detector.recent),
                "schedule": resume.describe_schedule(self.config, self.schedule),
                **self.early_stopping.state_dict(),
                **({"starvation": self.starvation.state_dict()} if self.starvation else {}),
                "stage": self.config.stage,
                "model": self.config.to_json()["model"],
                "tokenizer": self.tokenizer.fingerprint,
                "data": self.position,
                "rng": checkpoint.rng_state(),
                "versions": {"hamner": hamner.__version__, "torch": torch.__version__},
            },
        )

    def save_when_due(self, is_due: bool) -> None:
        """Save in the background: now, or once the save before is done or the disk takes it.

        Not while steps are bad: their cause may be in the state.
        """
        self.note_save(self.saver.collect())
        self.saver.wanted |= is_due
        if self.saver.may_begin(not self.bad_in_a_row):
            self.save()

    def save_best(self) -> None:
        """Have this step, the best so far, saved under its own number: `checkpoint.best` needs it.

        Not while steps are bad: their cause may be in the state.
        """
        self.note_save(self.saver.wait())
        if not self.bad_in_a_row:
            self.save()

    def save_last(self) -> None:
        """Have the last finished step on disk before leaving, unless its state is poisoned.

        Raises:
            UserError: the disk does not take it.
        """
        self.note_save(self.saver.wait())
        if self.poisoned or (self.saved is not None and self.saved.step == self.step):
            return
        self.save()
        error = self.note_save(self.saver.wait())
        if error:
            raise UserError(
                f"--run-dir {self.run.path}: the last checkpoint could not be written "
                f"({error.strerror}); make room there and go on with --resume"
            ) from error

    def note_save(self, outcome: Checkpoint | OSError | None) -> OSError | None:
        """Say how a save ended; returns the error, if any."""
        if isinstance(outcome, OSError):
            self.display.message(
                f"WARNING: step {self.saver.step:,} could not be saved ({outcome.strerror}); "
                "earlier checkpoints are whole, training goes on and tries again in "
                f"{RETRY_SECONDS:.0f} s"
            )
            return outcome
        if outcome is not None:
            self.saved = outcome
            self.display.message(f"saved {outcome.path}")
        return None

    def report_hang(self, between_steps: bool) -> None:
        """Say that the run hangs and save what can be, or end a job of several processes; called by
        the watchdog's thread."""
        self.processes.give_up(self.config.hang_minutes)
        self.display.message(
            f"WARNING: no step for {self.config.hang_minutes:g} minutes; what every thread does is "
            f"in {self.watchdog.stacks}"
        )
        if not between_steps:
            return  # half a step cannot be saved; a save under way goes on by itself
        self.note_save(self.saver.wait())
        if self.step and (self.saved is None or self.saved.step < self.step):
            self.save()
            self.note_save(self.saver.wait())

    def restore(self) -> None:
        """Load the newest whole checkpoint; a run that never saved starts over."""
        found, state, self.notes = self.processes.from_main(self.find_checkpoint)
        if found is None:
            self.processes.from_main(lambda: resume.rewind(self.run, 0))
            return
        resume.require_same_model(found, state, self.config, self.tokenizer)
        has_routers = resume.require_router_state(found, state, self.config.model)
        self.optimizer.restore(found, state["optimizer_steps"])
        resume.load_position(self.loader, state["data"], self.config, self.notes)
        self.position = self.loader.state_dict()
        self.schedule = resume.continue_schedule(self.config, self.schedule, state["schedule"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.watch = Stopwatch(state["seconds"])
        self.skipped.fill_(state["skipped_steps"])
        self.loss_sum.fill_(state["loss_sum"])
        self.loss_steps.fill_(state["loss_steps"])
        self.val_loss, self.val_step = state["val_loss"], state["val_step"]
        self.spike_detector = SpikeDetector(state["recent_losses"])
        self.early_stopping.load_state_dict(state)
        if has_routers:
            self.routers.interval_sum.copy_(torch.tensor(state["router_sum"]))
            self.starvation.load_state_dict(state["starvation"])
        checkpoint.set_rng_state(state["rng"])
        # Not before every process has taken its part of it.
        self.processes.any(False)
        self.processes.from_main(lambda: resume.rewind(self.run, self.step))
        self.saved = found

    def find_checkpoint(self) -> tuple[Checkpoint | None, dict, list[str]]:
        """The newest whole checkpoint, its state, and what to say of others."""
        notes: list[str] = []
        return *resume.find_checkpoint(self.run.checkpoints, notes), notes

    def draw(self) -> None:
        """Draw the run's plots, if the disk takes them."""
        try:
            plots.draw(self.run)
        except OSError as error:
            self.display.message(f"WARNING: plots not drawn ({error.strerror})")


def due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps (0: never) is due."""
    return every > 0 and step % every == 0
