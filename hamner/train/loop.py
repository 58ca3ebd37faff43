"""The training loop: build, resume, then step, log, evaluate, sample, save.

`TrainStep` (step.py) takes the steps, `TrainLog` (log.py) owns their numbers on the way to the
host, `Saves` (saves.py) the checkpoints; health.py notices what goes bad, resume.py knows what the
next start takes over. Of several processes each runs this loop in step with the others.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.run_folder import RecordLog, RunFolder
from hamner.config.train import TrainConfig
from hamner.data.bad_rows import lines_of
from hamner.data.batch import Batch
from hamner.data.loader import TrainLoader
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.data.validation import ValidationSet
from hamner.hardware import GIB
from hamner.parallel.processes import SingleProcess, open_processes
from hamner.parallel.tensors import local
from hamner.train import evaluation, health, messages, plots, resume
from hamner.train.display import Display
from hamner.train.early_stopping import EarlyStopping
from hamner.train.health import Watchdog
from hamner.train.interrupt import Interrupt
from hamner.train.log import LogLine, TrainLog
from hamner.train.reporters import open_reporters, require_installed
from hamner.train.resume import DataPosition, Generators, Progress
from hamner.train.saves import Saves, Stateful
from hamner.train.schedule import Schedule
from hamner.train.setup import open_saver
from hamner.train.step import (
    OnPhase,
    ShouldAbort,
    StepDoesNotFit,
    StepResult,
    TrainStep,
    ignore_phase,
)

PATIENCE_SECONDS = 10.0
"""longest an interrupted step is finished; a slower one is dropped and comes again on resume"""


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
    run = RunFolder(config.folder)
    loader = TrainLoader(config, tokenizer, pin_memory=pin_memory, bad_rows_file=run.bad_rows)
    validation = ValidationSet(run.validation, loader, config.eval_tokens)
    return RunData(loader, validation.rows, validation.keep)


def train(
    config: TrainConfig,
    open_data: OpenData = open_documents,
    initial: Checkpoint | None = None,
    on_phase: OnPhase = ignore_phase,
) -> TrainResult:
    """The function trains as `config` says, from the start or from the newest checkpoint.

    Args:
        config: resolved flags.
        open_data: what to train on.
        initial: whose weights to start from; default random ones.
        on_phase: see `TrainingLoop`.

    Raises:
        UserError: the configuration, the data or the run folder does not allow it; nothing is
            written before all three were read.
    """
    run = RunFolder(config.folder)
    with open_processes(config) as processes:
        processes.from_main(lambda: run.check(resume=config.resume))
        loop = TrainingLoop(
            config,
            run=run,
            open_data=open_data,
            initial=initial,
            processes=processes,
            on_phase=on_phase,
        )
        try:
            return loop.run_to_end()
        finally:
            loop.close()


class TrainingLoop:
    """One start of a run: everything it needs, built once, and the loop.

    Args:
        config: resolved flags.
        run: the run's folder, checked.
        open_data: what to train on.
        initial: whose weights to start from; default random ones.
        processes: that train together; default this one alone.
        on_phase: is told when a phase begins: those of `TrainStep`, "data", "step done",
            "evaluation", "" where none follows, and by the writer's thread "save" and "saved".
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        open_data: OpenData = open_documents,
        initial: Checkpoint | None = None,
        processes: SingleProcess | None = None,
        on_phase: OnPhase = ignore_phase,
    ) -> None:
        require_installed(config.report_to)
        self.config, self.run, self.on_phase = config, run, on_phase
        self.processes = processes or SingleProcess()
        self.is_main = self.processes.rank.is_main
        self.tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
        self.step = TrainStep(config, self.processes, initial, on_phase)
        compute = self.step.compute
        self.data = open_data(config, self.tokenizer, compute.device.type == "cuda")
        self.progress, self.schedule = Progress(), Schedule.of(config)
        self.early_stopping = EarlyStopping(config.patience)
        self.position = DataPosition(self.data.loader, allow_change=config.allow_data_change)
        self.display = Display(
            f"hamner {config.option}",
            self.schedule.total_tokens,
            None if compute.device.type == "cpu" else compute.budget_bytes / GIB,
        )
        self.log = TrainLog(config, run, self.step, display=self.display, reporters=[])
        self.samples = RecordLog(run.samples)
        parts = {
            "progress": self.progress,
            "optimizer": self.step.optimizer,
            "log": self.log,
            "schedule": self.schedule,
            "early_stopping": self.early_stopping,
            "data": self.position,
            "generators": Generators(),
        }
        found = self._restore(parts) if config.resume else None
        self.display.total_tokens = self.schedule.total_tokens
        self._start_folder()
        self.saves = open_saves(self, parts)
        self.saves.last = found
        stacks = run.stacks_of(self.processes.rank)
        self.watchdog = Watchdog(config.hang_minutes, stacks, self._report_hang)
        self.first_step = self.progress.step
        self.diagnosis: str | None = None

    def _restore(self, parts: dict[str, Stateful]) -> Checkpoint | None:
        """The parts go on from the newest whole checkpoint; see `resume.restore`."""
        found, notes = resume.restore(
            self.run,
            self.config,
            self.tokenizer,
            self.step,
            parts=parts,
            processes=self.processes,
        )
        self.step.messages += [*notes, *self.position.warnings]
        return found

    def _start_folder(self) -> None:
        """The run's folder, its logs and the services are there once nothing refuses any more."""
        self.processes.from_main(lambda: self.run.start(self.config))
        self.display.connect(*self.processes.open_log(self.run.logs))
        if self.is_main:
            self.data.keep()
            self.log.reporters += open_reporters(self.config)

    def close(self) -> None:
        """What runs beside the loop stops."""
        self.step.close()
        self.saves.saver.close()
        self.data.loader.close()
        for reporter in self.log.reporters:
            reporter.close()

    def run_to_end(self) -> TrainResult:
        """The loop trains until the run's length, `--stop-after`, an interrupt or a diagnosis; then
        it saves."""
        config, progress, saves = self.config, self.progress, self.saves
        is_alone = self.step.world_size == 1
        with self.display, Interrupt(is_alone=is_alone) as interrupt, self.watchdog:
            self._introduce()
            self.log.start(progress.step, progress.tokens)
            while not self.is_finished:
                batch = self._next_batch(interrupt)
                if batch is None:
                    break
                lr = self.schedule(progress.tokens + batch.inputs.numel())
                result = self._take_step(batch, lr, interrupt)
                if result is None:
                    break
                self._finish_step(batch, lr, result)
                step, done = progress.step, progress.tokens >= self.schedule.total_tokens
                evaluates = due(step, config.eval_every) or (done and config.eval_every)
                is_better = self._evaluate() if evaluates else False
                if evaluates or due(step, config.log_every) or done:
                    sources = self.data.loader.progress()
                    self.log.request_line(LogLine(progress.val_loss, progress.val_step, sources))
                is_healthy = not self.log.health.bad_in_a_row
                if is_better:
                    saves.save_best(step, is_healthy=is_healthy)
                is_due = due(step, config.save_every) and not done
                saves.save_when_due(step, is_due=is_due, is_healthy=is_healthy)
                if due(step, config.sample_every) or (done and config.sample_every):
                    self._sample()
                if config.stop_after and step - self.first_step >= config.stop_after:
                    break
            self.log.pause()
            self._diagnose()
            is_interrupted = self.processes.any(interrupt.requested)
            self.saves.save_last(self.progress.step)
            self._conclude(is_interrupted)
        return TrainResult(
            step=progress.step,
            tokens=progress.tokens,
            val_loss=progress.val_loss,
            checkpoint=saves.last.path if saves.last else None,
            # Asked again: it may have come during the last save.
            interrupted=self.processes.any(interrupt.requested),
            diagnosis=self.diagnosis,
        )

    @property
    def is_finished(self) -> bool:
        """Whether the run has its length or stopped improving."""
        has_length = self.progress.tokens >= self.schedule.total_tokens
        return has_length or self.early_stopping.exhausted

    def _next_batch(self, interrupt: Interrupt) -> Batch | None:
        """The next batch; None, in all processes, once one is interrupted or has diverged.

        If the data fails, what was trained is saved.
        """
        self.on_phase("data", self.progress.step + 1)
        batch = failure = None
        try:
            with self.watchdog.waiting():
                if not self.log.health.diverged:
                    batch = self.data.loader.next_batch(lambda: interrupt.requested)
        except Exception as error:
            failure = error
        stops, fails = self.processes.all_reduce_max([batch is None, failure is not None])
        self.on_phase("", self.progress.step + 1)
        if fails and self.progress.step:
            self.saves.save_last(self.progress.step)
        if failure:
            raise failure
        return None if stops else batch

    def _take_step(self, batch: Batch, lr: float, interrupt: Interrupt) -> StepResult | None:
        """The step's result; None if an interrupt came and the rest of it would take too long.

        Raises:
            StepDoesNotFit: it does not fit, what was trained is saved.
        """
        try:
            result = self.step.step(batch, lr, abort_when_slow(self, interrupt))
        except StepDoesNotFit as error:
            if self.progress.step and error.state_is_whole:
                self.saves.save_last(self.progress.step)
            raise
        self.display.messages(self.step.messages)
        return result

    def _finish_step(self, batch: Batch, lr: float, result: StepResult) -> None:
        """A step is counted, and those whose numbers have come in are looked at."""
        progress = self.progress
        self.position.advance()
        progress.step += 1
        progress.tokens += result.tokens
        self.watchdog.beat()
        self.processes.step_done(progress.step)
        self.log.record(progress.step, progress.tokens, lr=lr, batch=batch, result=result)
        self.on_phase("step done", progress.step)

    def _evaluate(self) -> bool:
        """The validation loss is measured; whether it is the best so far."""
        progress = self.progress
        self.log.pause()
        self.on_phase("evaluation", progress.step)
        loss = evaluation.validation_loss(self.step, self.data.validation)
        self.on_phase("", progress.step)
        if loss is not None:
            progress.val_loss, progress.val_step = loss, progress.step
        self.log.watch.start()
        return self.early_stopping.improved(progress.step, progress.val_loss)

    def _sample(self) -> None:
        """The fixed prompts are continued and the texts kept."""
        progress = self.progress
        self.log.pause()
        for prompt, text in evaluation.samples(self.step, self.tokenizer, self.config.seed):
            record = {
                "step": progress.step,
                "tokens": progress.tokens,
                "prompt": prompt,
                "text": text,
            }
            self.log.append(self.samples, record)
            self.display.message(f"sample: {prompt}{text}".replace("\n", " "))
        self.log.watch.start()

    def _diagnose(self) -> None:
        """If step after step was bad, the reason is looked for in the state."""
        last = self.log.health.diverged
        if last is None:
            return
        optimizer = self.step.optimizer
        state = {**optimizer.parameters, **optimizer.state_tensors()}
        found = health.not_finite({name: local(tensor) for name, tensor in state.items()})
        flags = self.processes.all_reduce_max([name in found for name in state])
        non_finite = [name for name, flag in zip(state, flags, strict=True) if flag]
        self.saves.is_state_lost = bool(non_finite)
        self.diagnosis = health.diagnose(last, non_finite)

    def _report_hang(self, between_steps: bool) -> None:
        """A hang is shown and what can be is saved, or a job of several processes is ended; called
        by the watchdog's thread."""
        self.processes.give_up(self.config.hang_minutes)
        self.display.message(
            f"WARNING: no step for {self.config.hang_minutes:g} minutes; what every thread does is "
            f"in {self.watchdog.stacks}"
        )
        if between_steps:  # half a step cannot be saved; a save under way goes on by itself
            self.saves.save_in_hang(self.progress.step)

    def _introduce(self) -> None:
        lines = messages.introduction(
            self.config,
            self.run,
            self.step,
            mfu=self.log.mfu,
            total_tokens=self.schedule.total_tokens,
            has_validation=bool(len(self.data.validation.inputs)),
            saved=self.saves.last,
        )
        self.display.messages(lines)
        self.display.messages(self.step.messages)

    def _conclude(self, is_interrupted: bool) -> None:
        """Rank 0 draws the plots, says where the run is and how to go on."""
        if not self.is_main:
            return
        run, progress, saved = self.run, self.progress, self.saves.last
        try:
            plots.draw(run)
        except OSError as error:
            self.display.message(f"WARNING: plots not drawn ({error.strerror})")
        if self.diagnosis:
            lines = messages.stopped_by_itself(self.diagnosis, progress.step, saved)
        elif not self.is_finished:
            lines = messages.stopped_before_the_end(
                self.config, run, progress.step, saved, interrupted=is_interrupted
            )
        else:
            lines = messages.done(
                run,
                saved,
                tokens=progress.tokens,
                seconds=self.log.watch.read(),
                val_loss=progress.val_loss,
                stopping=self.early_stopping,
            )
        sources = self.data.loader.progress().values()
        lines += lines_of((counts.get("bad_rows", {}) for counts in sources), run.bad_rows)
        self.display.messages(lines)


def open_saves(loop: TrainingLoop, parts: dict[str, Stateful]) -> Saves:
    """The checkpoints of a run hold its model, its optimizer and these parts."""
    config, run = loop.config, loop.run
    saver = open_saver(
        loop.step.engine,
        run.checkpoints,
        keep=config.keep,
        keep_every=config.keep_every,
        records=(run.metrics, run.samples),
        on_phase=loop.on_phase,
    )
    return Saves(
        run,
        loop.step,
        saver,
        parts=parts,
        facts=resume.facts(config, loop.tokenizer),
        records=(loop.log.metrics, loop.samples),
        drain=loop.log.drain,
        display=loop.display,
    )


def abort_when_slow(loop: TrainingLoop, interrupt: Interrupt) -> ShouldAbort:
    """The answer to whether the step that begins now is dropped; it also says how fast a CPU is,
    once its first micro-batch is done."""
    started = time.perf_counter()
    is_first_on_cpu = loop.progress.step == 0 and loop.step.compute.device.type == "cpu"

    def should_abort(done: int, total: int) -> bool:
        elapsed = time.perf_counter() - started
        if is_first_on_cpu and done == 1:
            rows = loop.step.world_size * loop.step.plan.micro_batch_size
            speed = rows * loop.config.seq_len / elapsed
            loop.display.message(messages.cpu_speed(speed, loop.schedule.total_tokens))
        return interrupt.requested and elapsed / done * (total - done) > PATIENCE_SECONDS

    return should_abort


def due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps (0: never) is due."""
    return every > 0 and step % every == 0
