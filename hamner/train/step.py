"""A step is forward, backward and update of a global batch, and nothing around it.

`TrainStep` is built from a configuration. It owns the model, the optimizer, the engine that divides
the work over processes, the memory plan and the CUDA graph. It knows no folder, display, clock or
signal, so the loop, the profiler, the benchmarks and the tests drive the same object.

Nothing in a step waits for the GPU: losses, the gradient norm and the skip of a bad step stay on
the device, and the number of kept targets is counted on the CPU before a batch leaves it.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hamner.checkpoint.format import Checkpoint
from hamner.config.train import TrainConfig
from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.errors import UserError
from hamner.model.attention import get_attention
from hamner.model.int8 import Int8Linears, Operand
from hamner.model.ops import build_ops
from hamner.model.transformer import RouterStatistics, Transformer
from hamner.parallel import device
from hamner.parallel.device import cap_memory
from hamner.parallel.engines import open_engine
from hamner.parallel.processes import SingleProcess
from hamner.plan.memory import MemoryPlan
from hamner.train.cuda_graph import GraphedBackward
from hamner.train.optimizer import Optimizer
from hamner.train.setup import attention_shape, can_record, decide, plan_memory

FIRST_STEPS = 5
"""steps after the start in which running out of memory changes the plan"""
STEP_DOWN = 0.9
"""share of the planned memory that the next plan may take"""

ShouldAbort = Callable[[int, int], bool]
"""(micro-batches done, micro-batches of the step in this process) -> whether to drop the step"""
OnPhase = Callable[[str, int], None]
"""(the phase that begins, the step from 1): called before each phase, in the training thread"""


@dataclass(frozen=True)
class StepResult:
    """A result is what a step came to, on the device; the next step overwrites all but loss and
    norm."""

    loss: Tensor
    """() fp32, mean cross-entropy over the kept targets of all processes, nats per token"""
    grad_norm: Tensor
    """() fp32, global 2-norm before clipping; the update was skipped if it is not finite"""
    tokens: int
    """of the whole batch"""
    router: Tensor | None
    """(layers, experts + 1) fp32: shares of the assignments, then the entropy in nats; or None"""
    int8: Tensor | None
    """(linear layers, operands, 2) fp32, see `Int8Linears.take_errors`; or None"""


class StepDoesNotFit(UserError):
    """The step ran out of memory, and no plan that needs less is left.

    Args:
        message: the sentence for the user.
        state_is_whole: whether weights and optimizer are those of the step before.
    """

    def __init__(self, message: str, *, state_is_whole: bool) -> None:
        super().__init__(message)
        self.state_is_whole = state_is_whole


def ignore_phase(phase: str, step: int) -> None:
    """The default observer does nothing."""


class TrainStep:
    """A step owns all that turns a batch into an update.

    Args:
        config: resolved flags.
        processes: that train together; default this single one.
        initial: whose weights to start from; default random ones.
        on_phase: called when the phases "forward", "backward" (or "graph", where a CUDA graph
            replays both), "accumulate" and "optimizer" begin, and with "" when none is open.
        may_step_down: whether a plan that turns out not to fit may be replaced, once.

    Raises:
        UserError: what is asked for does not fit or is not on this machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: SingleProcess | None = None,
        initial: Checkpoint | None = None,
        on_phase: OnPhase = ignore_phase,
        *,
        may_step_down: bool = True,
    ) -> None:
        self.config, self.processes, self.on_phase = config, processes or SingleProcess(), on_phase
        self._fit()
        cap_memory(self.compute, config)
        self.model = self._build_model(initial)
        self.optimizer = Optimizer(
            self.model,
            self.model.ops,
            config,
            dtype=self.compute.dtype,
            engine=self.engine,
        )
        self.forward = self.engine.wrap(self.model, self.optimizer)
        if config.compile:
            self.forward = torch.compile(self.forward)
        self.record_graph()
        self.router_sum: Tensor | None = None
        """of the step under way, see `StepResult.router`"""
        if config.model.is_moe:
            shape = (config.model.num_layers, config.model.num_experts + 1)
            self.router_sum = torch.zeros(shape, device=self.compute.device)
        int8 = self.model.int8
        self.int8_sum = None if int8 is None else int8.take_errors()
        """of the step under way, see `StepResult.int8`"""
        self.steps_taken = 0
        self.may_step_down = may_step_down
        self.messages: list[str] = []
        """sentences for the user that nobody has shown yet"""

    def _fit(self) -> None:
        """The step gets device, memory plan, attention and engine: what the configuration comes to
        on the machines at hand."""
        config, processes = self.config, self.processes
        self.compute = compute = device.select(config)
        # Everyone has the memory of the one that has least.
        budget = processes.all_reduce_min(compute.budget_bytes)
        kind, self.plan, self.attention = processes.from_main(
            lambda: decide(config, compute, budget, processes.rank)
        )
        # What rank 0 has chosen must run on this machine too.
        get_attention(self.attention.name, attention_shape(config, compute, self.plan))
        self.engine = open_engine(kind, processes, compute, config)
        rows = config.batch_size // processes.rank.world_size
        micro_batches = rows // self.plan.micro_batch_size
        self.records_graph = processes.from_main(
            lambda: (
                can_record(config, compute, self.attention.name)
                and (micro_batches == 1 or self.engine.records_parts)
            )
        )

    def _build_model(self, initial: Checkpoint | None) -> Transformer:
        """The model gets its device, and in fp32 the weights of `initial` or random ones."""
        ops = build_ops(self.compute.kernels, self.attention)
        # No weight has a value before it gets ours: torch's own, drawn first, would take seconds.
        with torch.device("meta"):
            model = Transformer(self.config.model, ops, self.plan.policies)
        self.engine.shard(model)
        model.to_empty(device=self.compute.device)
        if initial is None:
            model.initialize(self.config.seed)
        else:
            initial.load_model(model.state_dict())
        if self.config.matmul != "bf16":
            model.int8 = Int8Linears(self.config.model, self.config.matmul, self.compute.device)
        return model

    @property
    def is_graphed(self) -> bool:
        """The answer is whether forward and backward are, or will be, one CUDA graph."""
        return isinstance(self.forward_backward, GraphedBackward)

    @property
    def is_warm(self) -> bool:
        """The answer is whether a CUDA graph, if there is one, has been recorded."""
        return not self.is_graphed or self.forward_backward.graph is not None

    def step(
        self, batch: Batch, lr: float, should_abort: ShouldAbort = lambda done, total: False
    ) -> StepResult | None:
        """The step runs forward, backward and update on one global batch, in micro-batches.

        Running out of memory in the first steps of a start changes the plan once, to one that
        recomputes more; the step then begins again.

        Args:
            batch: (B, T) rows of all processes.
            lr: learning rate.
            should_abort: asked after each micro-batch; one process's yes drops the step in all.

        Returns:
            The result; None if the step was dropped, which leaves weights and optimizer as they
            were.

        Raises:
            StepDoesNotFit: there is no memory for it.
        """
        updates = self.optimizer.steps
        while True:
            try:
                return self._take(batch, lr, should_abort)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            # Out of the handler, whose error would keep the step's activations alive.
            is_unchanged = self.optimizer.steps == updates
            may_retry = is_unchanged and self.steps_taken < FIRST_STEPS
            if not (may_retry and self._step_down(reason)):
                break
        self.optimizer.drop_gradients()
        raise StepDoesNotFit(
            f"step {updates + 1:,} does not fit ({reason}): free the memory other programs hold, "
            "lower --micro-batch-size or --vram-budget, or recompute more (--recompute full)",
            # Of several processes, the others are half-way through the step.
            state_is_whole=is_unchanged and self.processes.rank.world_size == 1,
        )

    def launch_one_by_one(self) -> None:
        """From here on each kernel is launched by itself, without a CUDA graph."""
        self.forward_backward = self._forward_backward

    # NCCL keeps a communicator as long as graphs that were recorded with it.
    close = launch_one_by_one

    def record_graph(self) -> None:
        """From here on forward and backward are one CUDA graph, where that is possible; it is
        recorded anew."""
        self.forward_backward = self._forward_backward
        if self.records_graph:
            self.forward_backward = GraphedBackward(
                self._forward_backward,
                self.model.parameters(),
                warm_up_calls=self.engine.warm_up_calls,
            )

    def to_device(self, batch: Batch, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """The method gives the model's arguments of some rows: inputs, targets and, if documents
        are kept apart, document ids, each (rows, T) on the device."""
        documents = batch.document_ids if self.config.document_mask else None
        return tuple(
            None if tensor is None else tensor[rows].to(self.compute.device, non_blocking=True)
            for tensor in (batch.inputs, batch.targets, documents)
        )

    def _take(self, batch: Batch, lr: float, should_abort: ShouldAbort) -> StepResult | None:
        """The method takes the step as planned.

        Each micro-batch's mean loss is weighted by its share of the step's kept targets, so the
        step does not depend on how it is cut, nor on how many processes its micro-batches are
        dealt to.
        """
        size, number_of_rows = self.plan.micro_batch_size, len(batch.inputs)
        all_kept = int((batch.targets != IGNORED_TARGET).sum())
        starts = self.processes.share(range(0, number_of_rows, size))
        loss = torch.zeros((), device=self.compute.device)
        for sums in (self.router_sum, self.int8_sum):
            if sums is not None:
                sums.zero_()
        for number, start in enumerate(starts):
            rows, is_last = slice(start, start + size), number == len(starts) - 1
            kept = int((batch.targets[rows] != IGNORED_TARGET).sum())
            share = torch.full((), kept / max(1, all_kept), device=self.compute.device)
            with self.engine.micro_batch(is_last=is_last):
                arguments = self.to_device(batch, rows)
                if self.is_graphed:
                    self._enter("graph")
                cross_entropy, router, int8 = self.forward_backward(*arguments, share)
            self._enter("")
            loss += cross_entropy * share
            if self.router_sum is not None:
                means = torch.cat((router.load, router.entropy[:, None]), dim=1)
                self.router_sum += means * (len(batch.inputs[rows]) / number_of_rows)
            if self.int8_sum is not None:
                self.int8_sum += int8
            if len(starts) > 1:
                self._enter("accumulate")
                self.engine.accumulate(self.optimizer, is_last=is_last)
                self._enter("")
            if self.processes.any(should_abort(number + 1, len(starts))):
                self.optimizer.drop_gradients()
                return None
        self.processes.sum_(loss)
        for sums in (self.router_sum, self.int8_sum):
            if sums is not None:
                self.processes.sum_(sums)
        self._enter("optimizer")
        grad_norm = self.optimizer.step(lr, loss)
        self._enter("")
        if self.router_sum is not None and self.config.model.router_balance == "bias":
            self.model.balance_routers(self.router_sum[:, :-1], torch.isfinite(grad_norm))
        self.steps_taken += 1
        return StepResult(
            loss, grad_norm, batch.inputs.numel(), router=self.router_sum, int8=self.int8_sum
        )

    def _forward_backward(
        self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None, share: Tensor
    ) -> tuple[Tensor, RouterStatistics | None, Tensor | None]:
        """The gradients of `share` of a micro-batch's mean loss are left in the parameters.

        Returns:
            The micro-batch's mean cross-entropy, 0-d, what its routers did, and what quantisation
            lost.
        """
        self._enter("forward")
        output = self.forward(inputs, targets, document_ids)
        self._enter("backward")
        self.engine.backward(output.loss * share)
        router = output.router and RouterStatistics(*(x.detach() for x in output.router))
        int8 = self.model.int8 and self.model.int8.take_errors()
        return output.cross_entropy.detach(), router, int8

    def _enter(self, phase: str) -> None:
        self.on_phase(phase, self.optimizer.steps + 1)

    def fall_back(self, operands: Collection[Operand]) -> None:
        """The steps from the next one on multiply these operands, and no others, in bf16."""
        if self.model.int8 is not None and self.model.int8.fall_back(operands):
            if self.config.compile:
                # Graphs of the choice before are not used again; torch keeps no more than eight.
                torch.compiler.reset()
            self.follow(self.plan)

    def _step_down(self, reason: str) -> bool:
        """The step plans for a tenth less memory, once, and says whether there is such a plan.

        Not with several processes: the others are half-way through the step.
        """
        if not self.may_step_down or self.processes.rank.world_size > 1:
            return False
        self.may_step_down = False
        budget = int(STEP_DOWN * self.plan.account.total)
        try:
            plan = plan_memory(replace(self.config, recompute="auto"), self.compute, budget)
        except UserError:
            return False
        if plan.account.total > budget:
            return False
        self.messages.append(
            f"WARNING: {reason}. Other programs, or memory in pieces, leave less than was planned "
            f"with; going on with {plan}"
        )
        self.follow(plan)
        return True

    def follow(self, plan: MemoryPlan) -> None:
        """The steps from the next one on are taken by another plan."""
        self.plan = plan
        self.optimizer.drop_gradients()
        if self.model.int8 is not None:
            # A backward pass that broke off may have left sums, in a recording without values.
            self.model.int8.take_errors()
        self.model.policies = plan.policies
        self.record_graph()
        if self.compute.device.type == "cuda":
            torch.cuda.empty_cache()
