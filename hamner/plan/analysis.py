"""A plan is an option on a card, or on several: what it takes and where it leads, by arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.hardware import GIB, RESERVE_GIB, Gpu
from hamner.plan.communication import ONE_GPU, QUIET, Parallelism
from hamner.plan.efficiency import Efficiency
from hamner.plan.interval import Gain, find_gain
from hamner.plan.loss import BESIROGLU, KNOWN_RUN, LossLaw
from hamner.plan.memory import DoesNotFit, MemoryPlan, Policy, choose
from hamner.plan.projection import RunProjection
from hamner.plan.step_time import StepPrediction, predict

COMPARED = ("current", "a", "a-short", "b", "c", "c-shared")


@dataclass(frozen=True)
class Plan:
    """A plan is of one option on one card, or on several of a kind."""

    config: TrainConfig
    gpu: Gpu
    parallelism: Parallelism
    vram_budget: int
    """bytes of each GPU"""
    memory: MemoryPlan
    prediction: StepPrediction

    @property
    def parameters(self) -> int:
        return self.config.model.num_parameters()

    @property
    def active_parameters(self) -> int:
        """One token goes through this many parameters."""
        return self.config.model.num_parameters(active=True)

    @property
    def steps(self) -> int:
        return self.config.tokens // self.config.tokens_per_step

    @property
    def hours(self) -> float:
        """The run is projected to take this long, evaluation and saving aside."""
        return self.config.tokens / self.prediction.tokens_per_second / 3600

    @property
    def rows_per_gpu(self) -> int:
        """Each GPU has this many sequences in a step."""
        return self.parallelism.rows_per_gpu(self.config.batch_size)

    @property
    def communication_share(self) -> float:
        """Communication adds this share of a step's time."""
        return self.prediction.communication.exposed_ms / self.prediction.step_ms

    @property
    def efficiency(self) -> float | None:
        """Efficiency is tokens/s over those of as many GPUs, each by itself at the option's batch.

        It is None where a single GPU has too little memory.
        """
        batch_size = OPTIONS[self.config.option].batch_size
        single = replace(self.config, batch_size=batch_size, micro_batch_size=None)
        try:
            budget, reached = self.vram_budget / GIB, self.prediction.reached
            single = make_plan(single, self.gpu, vram_budget=budget, reached=reached)
        except UserError:
            return None
        speed = self.prediction.tokens_per_second / self.parallelism.ranks
        return speed / single.prediction.tokens_per_second

    @property
    def gain_of_int8(self) -> Gain | None:
        """The gain is over the plan with `--matmul bf16`; None for that plan itself."""
        if self.config.matmul == "bf16":
            return None
        config, reached = replace(self.config, matmul="bf16"), self.prediction.reached
        how = {"vram_budget": self.vram_budget / GIB, "reached": reached}
        bf16 = make_plan(config, self.gpu, self.parallelism, **how)
        return find_gain(bf16.prediction.milliseconds, self.prediction.milliseconds, reached)

    def under(self, policies: tuple[Policy, ...], **changes: int) -> "Plan":
        """The plan becomes that of other policies, and of a configuration with `changes`.

        Raises:
            UserError: it does not fit, where `changes` leave the micro-batch open.
        """
        option, reached = replace(self.config, **changes), self.prediction.reached
        wishes = {"vram_budget": self.vram_budget / GIB, "policies": policies, "reached": reached}
        return make_plan(option, self.gpu, self.parallelism, **wishes)

    def with_quiet_communication(self) -> "Plan | None":
        """The batch is doubled until communication takes less than QUIET of a step.

        Recomputation stays as it is, so that what does not fit becomes micro-batches. None
        where even 64 times the batch does not do: within a node FSDP sends with every micro-batch.
        """
        for times in (2, 4, 8, 16, 32, 64):
            tokens = max(self.config.tokens, times * self.config.tokens_per_step)
            batch_size = times * self.config.batch_size
            try:
                larger = self.under(self.memory.policies, batch_size=batch_size, tokens=tokens)
            except UserError:
                # No room for the fp32 sums that several micro-batches take.
                return None
            if larger.communication_share < QUIET:
                return larger
        return None

    def loss_range(self, law: LossLaw, tokens: float | None = None) -> tuple[float, float]:
        """The loss expected after `tokens` (default: at the end) has a lower and an upper bound.

        The law is about dense models: a mixture of experts should end between a dense model of all
        its parameters and one of its active ones. For a dense model both are the same.
        """
        tokens = tokens or self.config.tokens
        return law.loss(self.parameters, tokens), law.loss(self.active_parameters, tokens)

    def tokens_in(self, hours: float) -> float:
        return hours * 3600 * self.prediction.tokens_per_second


@dataclass(frozen=True)
class Analysis:
    """An analysis is all that the command prints and the report writes."""

    plan: Plan
    """of the option asked for; of the recommended one where all were"""
    recommended: Plan
    hours: float
    """the time in which options are compared: what `a` takes, or else the first of them"""
    plans: list[Plan]
    """of every option that fits"""
    misfits: dict[str, str]
    """option: why it does not fit"""
    run: RunProjection | None
    by_recipe: list[Plan]
    """`plan` with each recipe that fits"""

    @property
    def local_law(self) -> LossLaw:
        """The law is shifted to the end of the run under way, or through the known 164M run."""
        return (self.run and self.run.law) or BESIROGLU.through(*KNOWN_RUN)

    def law_reaching(self, loss: float) -> LossLaw:
        """The law is shifted to where the run under way reaches `loss`, if there is one."""
        return (self.run and self.run.law_near(loss)) or self.local_law

    @property
    def law_is_the_runs(self) -> bool:
        """`local_law` is that of the run under way."""
        return self.run is not None and self.run.law is not None


def make_plan(
    option: TrainConfig,
    gpu: Gpu,
    parallelism: Parallelism = ONE_GPU,
    *,
    vram_budget: float | None = None,
    policies: tuple[Policy, ...] | None = None,
    reached: Efficiency | None = None,
) -> Plan:
    """The function plans a run of `option`.

    Args:
        option: model, batch (over all GPUs) and length.
        gpu: the card.
        parallelism: how many of them and what connects them; "auto" is DDP where that fits.
        vram_budget: GiB of each GPU; default: the card's memory less RESERVE_GIB.
        policies: recomputation, one per layer; default: as `choose` fits them in.
        reached: the card's efficiencies; default: what is known of such cards.

    Raises:
        UserError: a budget that is beyond the card or too small, or a batch that the GPUs cannot
            share evenly.
    """
    wishes = {"vram_budget": vram_budget, "policies": policies, "reached": reached}
    if parallelism.kind == "auto":
        try:
            return make_plan(option, gpu, replace(parallelism, kind="ddp"), **wishes)
        except DoesNotFit:
            if parallelism.gpus_per_node == 1:
                raise
            return make_plan(option, gpu, replace(parallelism, kind="fsdp"), **wishes)
    if vram_budget is None:
        vram_budget = gpu.memory_gib - RESERVE_GIB
        if vram_budget <= 0:
            raise UserError(
                f"--vram-budget: {RESERVE_GIB:g} GiB are left to the desktop by default, and the "
                f"{gpu.name} has {gpu.memory_gib:g}; say how many a run may take"
            )
    if not 0 < vram_budget <= gpu.memory_gib:
        raise UserError(
            f"--vram-budget {vram_budget:g} GiB must be above 0 and at most the "
            f"{gpu.memory_gib:g} GiB of the {gpu.name}"
        )
    budget = int(vram_budget * GIB)
    memory = choose(option, budget, policies=policies, parallelism=parallelism)
    chosen = memory.policies, memory.micro_batch_size
    prediction = predict(option, gpu, *chosen, parallelism=parallelism, reached=reached)
    return Plan(option, gpu, parallelism, budget, memory=memory, prediction=prediction)


def recommend(plans: Sequence[Plan], hours: float) -> Plan:
    """The recommended plan has the lowest expected loss after `hours`.

    A mixture of experts counts by its active parameters.

    Options trained on less than their full context are left out where others are there: the law
    does not see context length.
    """
    full_context = [p for p in plans if p.config.seq_len == p.config.model.max_seq_len]
    return min(full_context or plans, key=lambda p: p.loss_range(BESIROGLU, p.tokens_in(hours))[1])
