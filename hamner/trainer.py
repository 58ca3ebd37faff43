"""The training loop: build, resume, then step, log, evaluate, sample, save.

Between two log lines nothing waits for the GPU: losses, the gradient norm and the skip of a bad
step stay on the device, and the number of kept targets is counted on the CPU before a batch leaves.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hamner
from hamner import checkpoint, device, plots, recompute
from hamner.attention import get_attention, waits_for_gpu
from hamner.checkpoint import Checkpoint
from hamner.config import TrainConfig
from hamner.cuda_graph import GraphedBackward
from hamner.data.loader import Batch, DataConfig, TrainLoader, validation_rows
from hamner.data.tokenizer import load_tokenizer
from hamner.display import Display, count, duration
from hamner.errors import UserError
from hamner.interrupt import Interrupt
from hamner.metrics import Mfu, Record, Stopwatch, peak_vram_gib
from hamner.model import RouterStatistics, Transformer
from hamner.ops import IGNORED_TARGET, build_ops
from hamner.optimizer import AdamW, Schedule
from hamner.options import flag
from hamner.reporting import open_reporters, require_installed
from hamner.run_folder import RunFolder, append_record
from hamner.sampling import PROMPTS, generate

PATIENCE_SECONDS = 10.0
"""longest an interrupted step is finished; a slower one is dropped and comes again on resume"""


EVALUATION_TOKENS = 2_048
"""of one forward pass of an evaluation"""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    tokens: int
    val_loss: float | None
    """of the last evaluation, nats per token"""
    checkpoint: Path | None
    interrupted: bool


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says, from the start or from the newest checkpoint.

    Raises:
        UserError: the configuration, the data or the run folder does not allow it; nothing is
            written before all three were read.
    """
    run = RunFolder(config.folder)
    run.check(resume=config.resume)
    trainer = Trainer(config, run)
    try:
        return trainer.run_to_end()
    finally:
        trainer.close()


class Trainer:
    """One start of a run: everything it needs, built once, and the loop.

    Args:
        config: resolved flags.
        run: the run's folder, checked.
    """

    def __init__(self, config: TrainConfig, run: RunFolder) -> None:
        require_installed(config.report_to)
        self.run = run
        self.compute = compute = device.select(config)
        self.tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
        self.plan = recompute.choose(
            config.model,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            precision=compute.precision,
            fused=compute.kernels == "triton",
            budget=compute.budget_bytes,
            policies=recompute.parse(config.recompute, config.model.num_layers),
            micro_batch_size=config.micro_batch_size,
            max_micro_batch_tokens=compute.max_micro_batch_tokens,
        )
        self.config = config
        self.attention = get_attention(
            config.attention,
            device=compute.device,
            dtype=compute.dtype,
            head_size=config.model.head_size,
            num_heads=config.model.num_attention_heads,
            num_kv_heads=config.model.num_kv_heads,
            seq_len=config.seq_len,
            micro_batch_size=self.plan.micro_batch_size,
            document_mask=config.document_mask,
        )
        data = DataConfig(
            specs=config.data,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            val_fraction=config.val_fraction,
        )
        self.loader = TrainLoader(data, self.tokenizer, pin_memory=compute.device.type == "cuda")
        self.validation = validation_rows(data, self.tokenizer, config.eval_tokens)

        ops = build_ops(compute.kernels, self.attention)
        # No weight has a value before `initialize`: torch's own, drawn first, would take seconds.
        with torch.device("meta"):
            self.model = Transformer(config.model, ops, self.plan.policies)
        self.model.to_empty(device=compute.device)
        self.model.initialize(config.seed)
        self.optimizer = AdamW(
            self.model,
            ops,
            dtype=compute.dtype,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
        )
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.micro_step = self.forward_backward
        if self.can_graph():
            self.micro_step = GraphedBackward(self.forward_backward, self.model.parameters())
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
        # On the device, read only when a line is logged.
        self.loss_sum = torch.zeros((), device=compute.device)
        self.loss_steps = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=compute.device)
        self.router: RouterStatistics | None = None
        self.saved: Checkpoint | None = None
        if config.resume:
            self.restore()
        run.start(config)
        self.reporters = open_reporters(config)
        budget_gib = None if compute.device.type == "cpu" else compute.budget_bytes / recompute.GIB
        self.display = Display(f"hamner {config.option}", config.total_tokens, budget_gib)

    def can_graph(self) -> bool:
        """Whether forward and backward can be one CUDA graph: the plain ops wait for the GPU in
        places, flash-attn does with documents, and compiled code has graphs of its own."""
        config = self.config
        waits = waits_for_gpu(self.attention.name, config.document_mask)
        return (
            config.cuda_graph
            and self.compute.device.type == "cuda"
            and self.compute.kernels == "triton"
            and not (config.compile or waits)
        )

    def close(self) -> None:
        """Stop what runs beside the loop."""
        self.loader.close()
        for reporter in self.reporters:
            reporter.close()

    def run_to_end(self) -> TrainResult:
        """Train until the run's length, `--stop-after` or an interrupt; then save."""
        config = self.config
        first_step = self.step
        with self.display, Interrupt() as interrupt:
            self.introduce()
            self.mark_interval()
            # The data position of a checkpoint is that of the last finished step.
            position = self.loader.state_dict()
            while self.tokens < config.total_tokens and not interrupt.requested:
                batch = next(self.loader)
                lr = self.schedule(self.tokens + batch.inputs.numel())
                norm = self.train_step(batch, lr, interrupt)
                if norm is None:
                    break
                position = self.loader.state_dict()
                self.step += 1
                self.tokens += batch.inputs.numel()
                done = self.tokens >= config.total_tokens
                if due(self.step, config.eval_every) or (done and config.eval_every):
                    self.evaluate()
                    self.log(lr, norm)
                elif due(self.step, config.log_every) or done:
                    self.log(lr, norm)
                if due(self.step, config.save_every) and not done:
                    self.try_to_save(position)
                if due(self.step, config.sample_every) or (done and config.sample_every):
                    self.sample()
                if config.stop_after and self.step - first_step >= config.stop_after:
                    break
            self.watch.pause()
            if self.saved is None or self.saved.step != self.step:
                self.save_last(position)
            plots.draw(self.run)
            self.conclude(interrupt.requested)
        return TrainResult(
            step=self.step,
            tokens=self.tokens,
            val_loss=self.val_loss,
            checkpoint=self.saved.path,
            interrupted=interrupt.requested,
        )

    def train_step(self, batch: Batch, lr: float, interrupt: Interrupt) -> Tensor | None:
        """Forward, backward and update on one global batch, in micro-batches.

        Each micro-batch's mean loss is weighted by its share of the step's kept targets, so the
        step does not depend on how it is cut.

        Returns:
            The gradient norm before clipping, 0-d on the device; None if an interrupt made the
            step be dropped because the rest of it would have taken too long.
        """
        size = self.plan.micro_batch_size
        starts = range(0, len(batch.inputs), size)
        kept = [int((batch.targets[s : s + size] != IGNORED_TARGET).sum()) for s in starts]
        started = time.perf_counter()
        loss = torch.zeros((), device=self.compute.device)
        for number, start in enumerate(starts):
            share = torch.full((), kept[number] / max(1, sum(kept)), device=self.compute.device)
            rows = slice(start, start + size)
            cross_entropy, router = self.micro_step(*self.to_device(batch, rows), share)
            loss += cross_entropy * share
            if len(starts) > 1:
                self.optimizer.accumulate()
            if self.step == 0 and number == 0 and self.compute.device.type == "cpu":
                self.announce_cpu_speed(time.perf_counter() - started, start + size)
            left = (time.perf_counter() - started) / (number + 1) * (len(starts) - number - 1)
            if interrupt.requested and left > PATIENCE_SECONDS:
                self.optimizer.drop_gradients()
                return None
        norm = self.optimizer.step(lr)
        self.loss_sum += loss
        self.loss_steps += 1
        self.skipped += ~torch.isfinite(norm)
        self.router = router
        return norm

    def forward_backward(
        self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None, share: Tensor
    ) -> tuple[Tensor, RouterStatistics | None]:
        """Leave the gradients of `share` of a micro-batch's mean loss in the parameters.

        Returns:
            The micro-batch's mean cross-entropy, 0-d, and what its routers did.
        """
        output = self.forward(inputs, targets, document_ids)
        (output.loss * share).backward()
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
        self.watch.pause()
        # In small pieces: a step's memory may be reserved by its CUDA graph at the same time.
        rows = len(self.validation.inputs)
        size = max(1, min(self.plan.micro_batch_size, EVALUATION_TOKENS // self.config.seq_len))
        if rows:
            total, kept = torch.zeros((), device=self.compute.device), 0
            for start in range(0, rows, size):
                part = slice(start, start + size)
                part_kept = int((self.validation.targets[part] != IGNORED_TARGET).sum())
                output = self.model(*self.to_device(self.validation, part))
                total += output.cross_entropy * part_kept
                kept += part_kept
            self.val_loss, self.val_step = total.item() / max(1, kept), self.step
        self.watch.start()

    def log(self, lr: float, norm: Tensor) -> None:
        """Read the device's counters: the only place where the loop waits for the GPU."""
        loss = self.loss_sum.item() / max(1, self.loss_steps)
        seconds = self.watch.read()
        speed = (self.tokens - self.interval_tokens) / max(1e-9, seconds - self.interval_seconds)
        record = Record(
            step=self.step,
            tokens=self.tokens,
            loss=loss,
            val_loss=self.val_loss,
            val_step=self.val_step,
            lr=lr,
            grad_norm=norm.item(),
            tokens_per_second=speed,
            mfu=self.mfu(speed),
            peak_vram_gib=peak_vram_gib(self.compute.device),
            seconds=seconds,
            skipped_steps=int(self.skipped.item()),
            router=describe_router(self.router),
        )
        append_record(self.run.metrics, record.to_json())
        for reporter in self.reporters:
            reporter.report(record)
        self.display.show(record)
        self.loss_sum.zero_()
        self.loss_steps = 0
        self.mark_interval()

    def mark_interval(self) -> None:
        """Start the interval the next log line is about."""
        if self.watch.started is None:
            self.watch.start()
        self.interval_tokens, self.interval_seconds = self.tokens, self.watch.read()

    def sample(self) -> None:
        """Continue the fixed prompts and keep the texts."""
        self.watch.pause()
        for prompt in PROMPTS:
            text = generate(self.model, self.tokenizer, prompt, seed=self.config.seed)
            record = {"step": self.step, "tokens": self.tokens, "prompt": prompt, "text": text}
            append_record(self.run.samples, record)
            self.display.message(f"sample: {prompt}{text}".replace("\n", " "))
        self.watch.start()

    def save(self, position: dict) -> None:
        """Write a checkpoint; `position` is the loader's state after the last finished step."""
        running = self.watch.started is not None
        if running:
            self.watch.pause()
        self.saved = checkpoint.save(
            self.run.checkpoints,
            self.step,
            model=self.optimizer.parameters,
            optimizer=self.optimizer.state_tensors(),
            state={
                "format": 1,
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.watch.read(),
                "optimizer_steps": self.optimizer.steps,
                "skipped_steps": int(self.skipped.item()),
                "loss_sum": self.loss_sum.item(),
                "loss_steps": self.loss_steps,
                "val_loss": self.val_loss,
                "val_step": self.val_step,
                "model": self.config.to_json()["model"],
                "tokenizer": self.tokenizer.fingerprint,
                "data": position,
                "rng": checkpoint.rng_state(),
                "versions": {"hamner": hamner.__version__, "torch": torch.__version__},
            },
        )
        checkpoint.retain(self.run.checkpoints, self.config.keep)
        self.display.message(f"saved {self.saved.path}")
        if running:
            self.watch.start()

    def try_to_save(self, position: dict) -> None:
        """Save, or go on training with a warning: the next save may find room."""
        try:
            self.save(position)
        except OSError as error:
            self.display.message(
                f"WARNING: step {self.step:,} could not be saved ({error.strerror}); earlier "
                "checkpoints are whole, training goes on and saves again later"
            )

    def save_last(self, position: dict) -> None:
        """Save before leaving.

        Raises:
            UserError: the disk does not take it.
        """
        try:
            self.save(position)
        except OSError as error:
            raise UserError(
                f"--run-dir {self.run.path}: the last checkpoint could not be written "
                f"({error.strerror}); make room there and go on with --resume"
            ) from error

    def restore(self) -> None:
        """Load the newest checkpoint; a run that never saved starts over."""
        found = checkpoint.find(self.run.checkpoints)
        if not found:
            return
        newest = found[-1]
        newest.verify()
        state = newest.state()
        self.require_same_model(newest, state)
        self.optimizer.restore(newest, state["optimizer_steps"])
        self.loader.load_state_dict(state["data"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.watch = Stopwatch(state["seconds"])
        self.skipped.fill_(state["skipped_steps"])
        self.loss_sum.fill_(state["loss_sum"])
        self.loss_steps = state["loss_steps"]
        self.val_loss, self.val_step = state["val_loss"], state["val_step"]
        checkpoint.set_rng_state(state["rng"])
        self.run.rewind(self.step)
        self.saved = newest

    def require_same_model(self, found: Checkpoint, state: dict) -> None:
        """Refuse to load another model's or another tokenizer's state."""
        ours = self.config.to_json()["model"]
        saved = state.get("model", {})
        for name, value in ours.items():
            if saved.get(name) != value:
                raise UserError(
                    f"--{flag(name)} {value} is not the {saved.get(name)} that {found.path} was "
                    "trained with; leave the flag out, or start another run with --run-dir"
                )
        if state.get("tokenizer") != self.tokenizer.fingerprint:
            raise UserError(
                f"--tokenizer {self.config.tokenizer} is not the one {found.path} was trained "
                "with; leave the flag out, or start another run with --run-dir"
            )

    def introduce(self) -> None:
        """Say what will run, before it does."""
        config, compute = self.config, self.compute
        model = config.model
        active = model.num_parameters(active=True)
        size = f"{model.num_parameters():,} parameters"
        if active != model.num_parameters():
            size += f", {active:,} active per token"
        lines = [
            f"option {config.option}: {size}; {count(config.total_tokens)} tokens in "
            f"{config.total_tokens // config.tokens_per_step:,} steps of "
            f"{config.batch_size} x {config.seq_len}",
            f"on {compute.name}, {compute.precision}, kernels {compute.kernels}, "
            f"attention {self.attention.name}: {self.attention.reason}",
            f"memory: {self.plan}",
            self.mfu.explain(),
        ]
        if compute.device.type == "cpu":
            lines.append("no GPU found: training on the CPU, which suits --option tiny only")
        if not len(self.validation.inputs):
            lines.append("the data is too small to hold out validation documents: no evaluation")
        if config.resume:
            where = f"from {self.saved.path}" if self.saved else "from the start: it never saved"
            lines.append(f"resuming {self.run.path} {where}")
        else:
            lines.append(f"run folder {self.run.path}")
        for line in lines:
            self.display.message(line)

    def announce_cpu_speed(self, seconds: float, rows: int) -> None:
        """Say how fast this CPU is and what that means for the whole run."""
        speed = rows * self.config.seq_len / seconds
        whole = duration(self.config.total_tokens / speed)
        self.display.message(
            f"measured on this CPU: about {speed:,.0f} tokens/s, so the full run of "
            f"{count(self.config.total_tokens)} tokens would take {whole}"
        )

    def conclude(self, interrupted: bool) -> None:
        """Say where the run is and how to go on."""
        if self.tokens < self.config.total_tokens:
            word = "interrupted" if interrupted else "stopped"
            self.display.message(
                f"{word} at step {self.step:,}; saved in {self.saved.path}; continue with "
                f"python -m hamner.train --resume --run-dir {self.run.path}"
            )
        else:
            loss = "" if self.val_loss is None else f", validation loss {self.val_loss:.4f}"
            self.display.message(
                f"done: {count(self.tokens)} tokens in {duration(self.watch.read())}{loss}; "
                f"model in {self.saved.path}, plots in {self.run.plots}"
            )


def due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps (0: never) is due."""
    return every > 0 and step % every == 0


def describe_router(router: RouterStatistics | None) -> dict | None:
    """Expert load and entropy per layer, for the metrics."""
    if router is None:
        return None
    return {"load": router.load.tolist(), "entropy": router.entropy.tolist()}
