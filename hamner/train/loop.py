"""The training loop builds, resumes, then steps, logs, evaluates, samples, saves.

`TrainStep` (step.py) takes the steps, `TrainLog` (log.py) owns their numbers on the way to the
host, `Saves` (saves.py) the checkpoints; health.py notices what goes bad, resume.py knows what the
next start takes over. Of several processes each runs this loop in step with the others.
"""

import contextlib
import time
from dataclasses import replace
from functools import partial

from hamner.checkpoint.run_folder import RunFolder
from hamner.checkpoint.saved_model import SavedModel
from hamner.config.train import TrainConfig
from hamner.data.bad_rows import lines_of
from hamner.data.batch import Batch
from hamner.hardware import GIB
from hamner.parallel.processes import SingleProcess, open_processes
from hamner.progress import SILENT
from hamner.train import health, messages, resume
from hamner.train.data import DataPosition, OpenData, open_documents
from hamner.train.display import Display, count, duration
from hamner.train.evaluation import EarlyStopping, Inspector
from hamner.train.first_steps import FirstSteps
from hamner.train.health import StepReading, Watchdog
from hamner.train.initial import find_initial, warn_of_missing_chat_tokens, with_chat_tokens
from hamner.train.interrupt import Interrupt
from hamner.train.log import LogLine, TrainLog
from hamner.train.messages import TrainResult
from hamner.train.pictures import Pictures
from hamner.train.reporters import open_reporters, require_installed
from hamner.train.saves import Progress, Saves
from hamner.train.schedule import Schedule
from hamner.train.step import OnPhase, StepDoesNotFit, TrainStep, ignore_phase

PATIENCE_SECONDS = 10.0
"""longest an interrupted step is finished; a slower one is dropped and comes again on resume"""


def train(config: TrainConfig, **options) -> TrainResult:
    """The function trains as `config` says, from the start or from the newest checkpoint.

    Args:
        config, options: see `TrainingLoop`.

    Raises:
        UserError: the configuration, the data or the run folder does not allow it; nothing is
            written before all three were read.
    """
    with (
        open_processes(config) as processes,
        RunFolder(config.folder) as run,
        contextlib.closing(TrainingLoop(config, run=run, processes=processes, **options)) as loop,
    ):
        return loop.run_to_end()


class TrainingLoop:
    """A loop is one start of a run, with everything it needs, built once.

    Args:
        config: resolved flags.
        open_data: what to train on.
        initial: whose weights and tokenizer to start from; default those that `--init-from` names.
        processes: see `TrainStep`.
        run: the run's folder; default that of `config`.
        on_phase: called when a phase begins: those of `TrainStep`, "data", "step done",
            "evaluation", "" where none follows, and by the writer's thread "save" and "saved".
        keeps_end: whether the run, once it has its length, is saved, and plots are drawn of it. Who
            reads nothing but its numbers need not wait for either.
    """

    def __init__(
        self,
        config: TrainConfig,
        open_data: OpenData = open_documents,
        initial: SavedModel | None = None,
        on_phase: OnPhase = ignore_phase,
        processes: SingleProcess | None = None,
        run: RunFolder | None = None,
        *,
        keeps_end: bool = True,
    ) -> None:
        self.config, self.run = config, run or RunFolder(config.folder)
        self.keeps_end = keeps_end
        self.processes = processes or SingleProcess()
        self.processes.from_main(lambda: self.run.open(resume=config.resume))
        require_installed(config.report_to)
        initial = initial or find_initial(config)
        tokenizer = initial.tokenizer if initial else self.run.open_tokenizer(config)
        self.tokenizer = with_chat_tokens(tokenizer, config)
        self.schedule = Schedule(config)
        self.display = Display(f"hamner {config.option}", self.schedule.total_tokens)
        shown = self.display.status if self.processes.rank.is_main else SILENT
        with shown.task("building the model"):
            self.step = TrainStep(config, self.processes, initial and initial.checkpoint, on_phase)
        self.step.messages += warn_of_missing_chat_tokens(self.tokenizer, config)
        is_gpu = self.step.compute.device.type == "cuda"
        self.display.budget_gib = self.step.compute.budget_bytes / GIB if is_gpu else None
        reading = f"reading {' '.join(config.data) or 'the built-in corpus'}"
        if self.processes.rank.is_main:
            self.display.message(reading)
        with shown.task(reading):
            self.data = open_data(config, self.tokenizer, is_gpu, shown)
        self.position = DataPosition(self.data.loader, config, self.step.messages)
        self.position.require_same_data(self.processes)
        self.progress = Progress()
        self.early_stopping = EarlyStopping(config.patience)
        self.log = TrainLog(self.run, self.step, self.display)
        self.pictures = Pictures(self.run.path, self.log.beside)
        learning = (self.progress, self.step.optimizer, self.log, self.schedule)
        parts = (*learning, self.early_stopping, self.position)
        self.saves = Saves(self.log, self.progress, parts, self.tokenizer)
        if config.resume:
            with shown.task("reading the checkpoint"):
                self.saves.last = resume.restore(self.run, self.tokenizer, self.step, parts)
        self.display.total_tokens = self.schedule.total_tokens
        self._start_folder()
        stacks = self.run.stacks_of(self.processes.rank)
        self.watchdog = Watchdog(config.hang_minutes, stacks, self._report_hang)
        self.interrupt = Interrupt(is_single=self.processes.rank.world_size == 1)
        self.inspector = Inspector(
            self.log,
            progress=self.progress,
            early_stopping=self.early_stopping,
            interrupt=self.interrupt,
            validation=self.data.validation,
            tokenizer=self.tokenizer,
        )
        self.first_steps = FirstSteps(self.log, is_compiled=is_gpu or config.compile)
        self.first_step = self.progress.step

    def _start_folder(self) -> None:
        """The run's folder, its logs and the services are there once nothing refuses any more."""
        self.processes.from_main(lambda: self.run.start(self.config, self.tokenizer))
        self.display.connect(*self.processes.open_log(self.run.logs))
        if self.log.is_main:
            self.data.keep()
            if self.keeps_end:
                self.log.reporters.append(self.pictures)
            self.log.reporters += open_reporters(
                self.config, self.log.beside, first_step=self.progress.step + 1
            )

    def close(self) -> None:
        """What runs beside the loop stops, and the folder is free."""
        self.step.close()
        self.saves.saver.close()
        self.data.loader.close()
        for reporter in self.log.reporters:
            with self.log.beside(f"closing {type(reporter).__name__}", then="the run is whole"):
                reporter.close()
        self.run.owner.release()

    def run_to_end(self) -> TrainResult:
        """The loop trains until the run's length, `--stop-after`, an interrupt or a diagnosis; then
        it saves."""
        progress, stop_after = self.progress, self.config.stop_after
        with self.display, self.interrupt, self.watchdog, self.first_steps:
            has_validation = bool(len(self.data.validation.inputs))
            lines = messages.introduction(self.log, self.saves, has_validation=has_validation)
            self.display.messages(lines)
            self.display.messages(self.step.messages)
            self.log.start(progress.step, progress.tokens)
            self._make_up_evaluation()
            while not self.is_finished:
                batch = self._next_batch()
                if batch is None or not self._take_step(batch):
                    break
                self._look_after_step()
                if stop_after and progress.step - self.first_step >= stop_after:
                    break
            self.log.pause()
            diagnosis = self._diagnose()
            is_interrupted = self.processes.any(self.interrupt.requested)
            is_kept = self.keeps_end or not self.has_length or self._owes_evaluation
            if is_kept:
                self.saves.save_last()
            result = TrainResult(
                step=progress.step,
                tokens=progress.tokens,
                val_loss=progress.val_loss,
                checkpoint=self.saves.last.path if is_kept and self.saves.last else None,
                interrupted=is_interrupted,
                diagnosis=diagnosis,
                val_step=progress.val_step,
            )
            self._conclude(result)
        # Asked again: it may have come during the last save.
        return replace(result, interrupted=self.processes.any(self.interrupt.requested))

    @property
    def has_length(self) -> bool:
        """The run has as many tokens as it should."""
        return self.progress.tokens >= self.schedule.total_tokens

    @property
    def is_finished(self) -> bool:
        """The run has its length or stopped improving."""
        return self.has_length or self.early_stopping.exhausted

    def _next_batch(self) -> Batch | None:
        """The method gives the next batch; None, in all processes, once one is interrupted or has
        diverged.

        If the data fails, what was trained is saved.
        """
        self.step.on_phase("data", self.progress.step + 1)
        batch = failure = None
        try:
            with self.watchdog.waiting():
                if not self.log.health.diverged:
                    batch = self.data.loader.next_batch(lambda: self.interrupt.requested)
        except Exception as error:
            failure = error
        stops, fails = self.processes.all_reduce_max([batch is None, failure is not None])
        self.step.on_phase("", self.progress.step + 1)
        if fails and self.progress.step:
            self.saves.save_last()
        if failure:
            raise failure
        return None if stops else batch

    def _take_step(self, batch: Batch) -> bool:
        """A step is taken and counted, and those whose numbers have come in are looked at.

        Returns:
            False if an interrupt came and the rest of the step would take too long.

        Raises:
            StepDoesNotFit: it does not fit, what was trained is saved.
        """
        progress = self.progress
        lr = self.schedule(progress.tokens + batch.inputs.numel())
        should_abort = partial(self._should_abort, time.perf_counter())
        self.step.fall_back(self.log.int8_guard.due(progress.step + 1))
        try:
            result = self.step.step(batch, lr, should_abort)
        except StepDoesNotFit as error:
            if progress.step and error.state_is_whole:
                self.saves.save_last()
            raise
        self.display.messages(self.step.messages)
        if result is None:
            return False
        self.position.advance()
        progress.step += 1
        progress.tokens += result.tokens
        self.watchdog.beat()
        self.processes.step_done(progress.step)
        self.log.record(StepReading(progress.step, progress.tokens, lr, batch), result)
        self.step.on_phase("step done", progress.step)
        self.first_steps.step_done(progress.step, progress.tokens)
        return True

    def _should_abort(self, started: float, done: int, micro_batches: int) -> bool:
        """The answer is whether the step that `started` is dropped; the method also says how fast a
        CPU is, once the first micro-batch of the run is done."""
        self.first_steps.micro_batch_done(done, micro_batches)
        elapsed = time.perf_counter() - started
        if self.progress.step == 0 and self.step.compute.device.type == "cpu" and done == 1:
            rows = self.processes.rank.world_size * self.step.plan.micro_batch_size
            speed = rows * self.config.seq_len / elapsed
            total = self.schedule.total_tokens
            self.display.message(
                f"measured on this CPU: about {speed:,.0f} tokens/s, so the full run of "
                f"{count(total)} tokens would take {duration(total / speed)}"
            )
        left = elapsed / done * (micro_batches - done)
        return self.interrupt.requested and left > PATIENCE_SECONDS

    def _look_after_step(self) -> None:
        """An evaluation, a log line, saves and samples follow a step after which they are due."""
        config, progress, done = self.config, self.progress, self.has_length

        def due(every: int) -> bool:
            """The answer is whether what is done `every` so many steps (0: never) is due."""
            return every > 0 and progress.step % every == 0

        evaluates = due(config.eval_every) or (done and config.eval_every)
        is_better = self.inspector.evaluate() if evaluates else False
        if evaluates or due(config.log_every) or done:
            sources = self.data.loader.progress()
            self.log.request_line(LogLine(progress.val_loss, progress.val_step, sources))
        if due(config.sample_every) or (done and config.sample_every):
            # Before a save, as a run that resumes from it takes none of this step.
            self.inspector.sample()
        if is_better:
            self.saves.save_best()
        has_begun = self.saves.save_when_due(due(config.save_every) and not done)
        if has_begun and self.keeps_end and self.log.is_main:
            self.pictures.begin()

    @property
    def _owes_evaluation(self) -> bool:
        """The last finished step should be evaluated, and has not been."""
        progress, every = self.progress, self.config.eval_every
        is_due = every > 0 and progress.step and (progress.step % every == 0 or self.has_length)
        has_rows = bool(len(self.data.validation.inputs))
        return bool(is_due and has_rows and progress.val_step != progress.step)

    def _make_up_evaluation(self) -> None:
        """What the start before abandoned is measured now, and written where it belongs."""
        if not self._owes_evaluation:
            return
        progress = self.progress
        self.inspector.evaluate()
        if self._owes_evaluation:
            return
        self.display.message(
            f"validation loss {progress.val_loss:.4f} at step {progress.step:,}, whose evaluation "
            "had been abandoned"
        )
        values = {"val_loss": progress.val_loss, "val_step": progress.val_step}
        if self.log.is_main:
            with self.log.beside("the record of that loss"):
                self.run.amend(progress.step, values)
        self.saves.save_best()

    def _diagnose(self) -> str | None:
        """If step after step was bad, the reason is looked for in the state."""
        last = self.log.health.diverged
        if last is None:
            return None
        return health.diagnose(last, self.saves.non_finite())

    def _report_hang(self, between_steps: bool) -> None:
        """A hang is shown and what can be is saved, or a job of several processes is ended; called
        by the watchdog's thread."""
        self.processes.give_up(self.config.hang_minutes)
        self.display.message(
            f"WARNING: no step for {self.config.hang_minutes:g} minutes; what every thread does is "
            f"in {self.watchdog.stacks}"
        )
        if between_steps:  # half a step cannot be saved; a save under way goes on by itself
            self.saves.save_in_hang()

    def _conclude(self, result: TrainResult) -> None:
        """Rank 0 draws the plots, says where the run is and how to go on."""
        if not self.log.is_main:
            return
        if self.keeps_end:
            with self.display.status.task("drawing the plots"):
                self.pictures.finish()
        is_finished = self.is_finished and not (result.interrupted and self._owes_evaluation)
        self.display.messages(
            messages.conclusion(self.log, result, self.early_stopping, is_finished=is_finished)
        )
        sources = self.data.loader.progress().values()
        bad_rows = (counts.get("bad_rows", {}) for counts in sources)
        self.display.messages(lines_of(bad_rows, self.run.bad_rows))
