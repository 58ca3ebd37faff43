"""A plan is said in Markdown: on the screen through rich, or as a document with plots.

Each table and each finding is worded once, here; `screen` and `write_report` only arrange them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hamner.errors import UserError
from hamner.files import figure_bytes, is_pipe_or_device, require_writable, write_whole, writing
from hamner.hardware import GIB
from hamner.plan.analysis import Analysis, Plan
from hamner.plan.communication import QUIET
from hamner.plan.costs import flops_per_token
from hamner.plan.efficiency import MEASURED_ERRORS, efficiency
from hamner.plan.loss import (
    BESIROGLU,
    COHERENT_LOSS,
    FLUENT_LOSS,
    HOFFMANN,
    KNOWN_RUN,
    LossLaw,
    compute_optimal_tokens,
)
from hamner.plan.memory import FULL, NONE, SELECTIVE, MemoryAccount, describe
from hamner.plan.projection import RunProjection
from hamner.plan.recipe_gain import (
    LAW_DEVIATION,
    PUBLISHED,
    Bounds,
    loss_at,
    source,
    tokens_to_reach,
)
from hamner.plan.step_time import shared_flags
from hamner.plan.words import count, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LAW = "loss by the published law"
_TOO_SMALL = "too small for the law"
"""the law expects worse than guessing"""
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon, AdamW for embedding and norms"}


def _decimal(value: float, digits: int) -> str:
    """The text has so many decimals, or one significant digit where those would all be zero."""
    text = f"{value:,.{digits}f}"
    return text if float(text.replace(",", "")) or not value else f"{value:.1g}"


def _range(bounds: tuple[float, float], digits: int) -> str:
    texts = [_decimal(bound, digits) for bound in bounds]
    return texts[0] if texts[0] == texts[1] else "-".join(texts)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.1f}" if loss < 700 else "inf"


def _losses(plan: Plan, hours: float | None) -> dict[str, str]:
    bounds = plan.loss_range(BESIROGLU)
    if bounds[1] > math.log(plan.config.model.vocab_size):
        return {_LAW: _TOO_SMALL}
    rows = {
        _LAW: _range(bounds, 2),
        "perplexity by it": _range((math.exp(bounds[0]), math.exp(bounds[1])), 1),
    }
    if hours is not None:
        bounds = plan.loss_range(BESIROGLU, plan.tokens_in(hours))
        rows[f"loss by it after {hours:,.0f} h"] = _range(bounds, 2)
    return rows


def _gpus(plan: Plan, one: str = "") -> str:
    """The name is `RTX 3090` after `one`, `2 x RTX 3090`, or `4 nodes of 8 x H100 SXM`."""
    parallelism = plan.parallelism
    if parallelism.ranks == 1:
        return one + plan.gpu.name
    nodes = f"{parallelism.nodes} nodes of " if parallelism.nodes > 1 else ""
    return f"{nodes}{parallelism.gpus_per_node} x {plan.gpu.name}"


def _scaling(plan: Plan) -> dict[str, str]:
    """These rows are of several GPUs."""
    if plan.parallelism.ranks == 1:
        return {}
    share = plan.efficiency
    return {
        "parallel": plan.parallelism.kind,
        "batch per GPU": str(plan.rows_per_gpu),
        "sent per GPU and step, GB": f"{plan.prediction.communication.bytes_sent / 1e9:.2f}",
        "communication, share of a step": f"{plan.communication_share:.1%}",
        f"efficiency against {plan.parallelism.ranks} single GPUs": (
            "does not fit one" if share is None else f"{share:.0%}"
        ),
    }


def _days(plan: Plan) -> tuple[str, str]:
    """How long the run should take, in days: the projected, and the shortest and the longest."""
    shortest, longest = (h / 24 for h in plan.prediction.interval.hours(plan.config.tokens))
    digits = 1 if shortest > 1 else 2
    return _decimal(plan.hours / 24, digits), _range((shortest, longest), digits)


def _length(plan: Plan) -> str:
    """The shortest and the longest the run should take, in the unit of its length."""
    bounds = plan.prediction.interval.hours(plan.config.tokens)
    units = {"days": 24.0, "hours": 1.0, "minutes": 1 / 60}
    unit = next((unit for unit, hours in units.items() if bounds[0] >= hours), "seconds")
    hours = units.get(unit, 1 / 3600)
    return f"{_range((bounds[0] / hours, bounds[1] / hours), 1)} {unit}"


def _quantities(plan: Plan, hours: float | None) -> dict[str, str]:
    option, model, prediction = plan.config, plan.config.model, plan.prediction
    interval, (days, shortest_longest) = prediction.interval, _days(plan)
    gib = "VRAM, GiB" if plan.parallelism.ranks == 1 else "VRAM of each GPU, GiB"
    return {
        "": option.option,
        "parameters": count(plan.parameters),
        "active per token": count(plan.active_parameters),
        "layers x width": f"{model.num_layers} x {model.hidden_size}",
        "batch x sequence": f"{option.batch_size} x {option.seq_len}",
        "tokens per step": f"{option.tokens_per_step:,}",
        "FLOPs per token": f"{prediction.flops_per_token / 1e9:.2f}G",
        "recompute": describe(plan.memory.policies),
        "micro-batch": str(plan.memory.micro_batch_size),
        gib: f"{prediction.peak_gib:.1f}",
        **_scaling(plan),
        "tokens/s (projected)": f"{prediction.tokens_per_second:,.0f}",
        "tokens/s, low-high": f"{interval.low:,.0f}-{interval.high:,.0f}",
        "MFU (projected)": f"{prediction.mfu:.0%}",
        "tokens": count(plan.config.tokens),
        "steps": f"{plan.steps:,}",
        "hours (projected)": _decimal(plan.hours, 1),
        "days (projected)": days,
        "days, low-high": shortest_longest,
        "compute-optimal tokens": count(compute_optimal_tokens(plan.active_parameters)),
        **_losses(plan, hours),
    }


def options_table(plans: Sequence[Plan], hours: float | None = None) -> str:
    """Plans stand side by side, one a column; their loss is compared after `hours`."""
    columns = [_quantities(plan, hours) for plan in plans]
    names = max(columns, key=len)
    return table([name, *(column.get(name, "") for column in columns)] for name in names)


def _kinds(memory: MemoryAccount) -> dict[str, int]:
    """The bytes by kind add up to the total."""
    names = ("weights", "optimizer", "activations", "communication")
    kinds = {name: size for name in names if (size := getattr(memory, name))}
    return kinds | {"loss, or gradients": memory.total - sum(kinds.values())}


def _policies(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The generator gives each policy for the whole batch, and the plan's own choice."""
    layers, rows = plan.config.model.num_layers, plan.rows_per_gpu
    choices = [((policy,) * layers, rows) for policy in (NONE, SELECTIVE, FULL)]
    chosen = plan.memory.policies, plan.memory.micro_batch_size
    for policies, micro_batch in choices if chosen in choices else [*choices, chosen]:
        split = f", micro-batch {micro_batch}" if micro_batch < rows else ""
        mark = " (chosen)" if (policies, micro_batch) == chosen else ""
        other = plan.under(policies, micro_batch_size=micro_batch)
        yield f"{describe(policies)}{split}{mark}", other


def memory_table(plan: Plan) -> str:
    """The table has GiB by kind under each recomputation policy, and what each costs in speed."""
    budget = f"within {plan.vram_budget / GIB:.1f} GiB"
    columns = [["GiB", *_kinds(plan.memory.account), "total", budget, "tokens/s (projected)"]]
    for name, other in _policies(plan):
        memory = other.memory.account
        sizes = (*_kinds(memory).values(), memory.total)
        fits = "yes" if memory.total <= plan.vram_budget else "no"
        speed = f"{other.prediction.tokens_per_second:,.0f}"
        columns.append([name, *(f"{size / GIB:.2f}" for size in sizes), fits, speed])
    return table(zip(*columns, strict=True))


def step_times(plan: Plan) -> str:
    """The sentence has the projected milliseconds of a step by kind of work."""
    times = plan.prediction.milliseconds.items()
    parts = ", ".join(f"{category} {spent:,.1f}" for category, spent in times if spent)
    return f"A step takes {plan.prediction.step_ms:,.1f} ms, projected: {parts}."


def speed_interval(plan: Plan) -> str:
    """The paragraph says between which speeds and lengths the run should lie, and why."""
    interval, gain, than_bf16 = plan.prediction.interval, plan.gain_of_int8, ""
    if gain is not None:
        than_bf16 = (
            f"\n\nThe run should be {gain.best:.2f} times as fast as with --matmul bf16, "
            f"{gain.low:.2f} to {gain.high:.2f}. What int8 costs in loss is not in that "
            "(docs/training.md)."
        )
    return (
        f"Nine of ten runs of option {plan.config.option} should reach {interval.low:,.0f} to "
        f"{interval.high:,.0f} tokens/s and take {_length(plan)}. "
        "Each cause by itself:\n\n" + _bullets(str(cause) for cause in interval.causes) + than_bf16
    )


def communication_findings(plan: Plan) -> list[str]:
    """They say what is sent, over what, how much of it shows, and with which batch less does."""
    parallelism, sent = plan.parallelism, plan.prediction.communication
    if parallelism.ranks == 1:
        return []
    links = []
    if parallelism.gpus_per_node > 1:
        own = parallelism.link_gbs == plan.gpu.link.gbs
        name = f"{plan.gpu.link.name}, assumed" if own else "--link"
        links.append(f"{parallelism.link_gbs:g} GB/s between the GPUs of a node ({name})")
    if parallelism.nodes > 1:
        links.append(f"{parallelism.network_gbs:g} GB/s between nodes (--network)")
    lines = [
        f"Communication, projected: each GPU sends {sent.bytes_sent / 1e9:.2f} GB a step in "
        f"{sent.ms:,.1f} ms at {' and '.join(links)}; all but {sent.exposed_ms:,.1f} ms, "
        f"{plan.communication_share:.1%} of the step, is hidden."
    ]
    if plan.communication_share < QUIET:
        return lines
    larger = plan.with_quiet_communication()
    if larger is None:
        lines.append(
            f"No batch up to 64 times as large fits and brings that under {QUIET:.0%}; faster "
            "links or fewer GPUs would."
        )
    else:
        batch, micro_batch = larger.config.batch_size, larger.memory.micro_batch_size
        lines.append(
            f"--batch-size {batch} --micro-batch-size {micro_batch} in hamner.train (micro-batches "
            f"of each GPU in a step: {larger.rows_per_gpu // micro_batch}) brings that to "
            f"{larger.communication_share:.1%} and {larger.prediction.tokens_per_second:,.0f} "
            "tokens/s. The larger the batch, the more tokens the same loss may take."
        )
    return lines


def coherence_table(analysis: Analysis) -> str:
    """The table says when each option reaches the loss below which samples read as text."""
    goal = f"loss {COHERENT_LOSS} (perplexity {math.exp(COHERENT_LOSS):.0f}) reached after"
    rows = [[goal, "tokens", "hours (projected)", "within the plan"]]
    for plan in analysis.plans:
        # The law of a run under way is that of its own recipe.
        recipe = "plan" if analysis.law_is_the_runs else plan.config.recipe
        law, size = analysis.law_reaching(COHERENT_LOSS), plan.active_parameters
        bounds = tokens_to_reach(COHERENT_LOSS, recipe, size, law)
        if bounds is None:
            rows.append([plan.config.option, "never", "", "model too small"])
            continue
        tokens = bounds.middle
        hours = plan.hours * tokens / plan.config.tokens
        within = "yes" if tokens <= plan.config.tokens else "no"
        rows.append([plan.config.option, count(tokens), f"{hours:,.1f}", within])
    return table(rows)


def recipes_table(analysis: Analysis) -> str:
    """The table says what each recipe takes to two losses, and where the planned run ends."""
    goals = (COHERENT_LOSS, FLUENT_LOSS)
    reached = (f"hours to loss {goal}" for goal in goals)
    end = f"loss at {count(analysis.plan.config.tokens)} tokens"
    rows = [["recipe (80% interval)", "tokens/s (projected)", *reached, end]]
    for plan in analysis.by_recipe:
        recipe, size = plan.config.recipe, plan.active_parameters
        cells = [recipe, f"{plan.prediction.tokens_per_second:,.0f}"]
        for goal in goals:
            tokens = tokens_to_reach(goal, recipe, size, analysis.local_law)
            hours = tokens and tokens.times(plan.hours / plan.config.tokens)
            cells.append("never" if hours is None else _with_interval(hours, 0))
        loss = loss_at(plan.config.tokens, recipe, size, analysis.local_law)
        is_known = loss.high <= math.log(plan.config.model.vocab_size)
        rows.append([*cells, _with_interval(loss, 2) if is_known else _TOO_SMALL])
    return table(rows)


def _with_interval(bounds: Bounds, digits: int) -> str:
    texts = (f"{value:,.{digits}f}" for value in (bounds.middle, bounds.low, bounds.high))
    return "{} ({}-{})".format(*texts)


def recipes_caveat() -> str:
    """The sentence says what the comparison of recipes rests on."""
    published = ", ".join(f"{recipe} {ratio:g}" for recipe, (_, ratio, _) in PUBLISHED.items())
    return (
        "What a recipe saves (the hours are those of a run whose schedule ends there) is a line in "
        f"the logarithms through the ratios of tokens that were measured, on {source()}; and "
        f"through what is published for whole runs ({published} times fewer at 10B tokens), as "
        f"nothing was run that far. The plan's own loss is taken to be good to {LAW_DEVIATION} "
        "nats, being the law through one run. `python -m bench.recipes fit` does it again from new "
        "results."
    )


def caveats(plan: Plan) -> list[str]:
    """They say what the projections rest on."""
    option, prediction = plan.config, plan.prediction
    whole_square = flops_per_token(option.model, option.seq_len, causal=False)
    runs, lowest, highest = zip(*MEASURED_ERRORS.values(), strict=True)
    here = []
    if prediction.reached == efficiency(plan.gpu):  # and no clock, limit or report card
        _, *here = MEASURED_ERRORS.get(plan.gpu.name, (0,))
    ends = dict.fromkeys(f"{error:+.0%}" for error in here)
    on_this_card = f", on this card {' to '.join(ends)}" if here else ""
    parameters, tokens, loss = KNOWN_RUN
    lines = [
        f"Speed on the {plan.gpu.name} is projected: {prediction.reached.provenance}. "
        f"Against the {sum(runs)} runs measured so far the model is {min(lowest):+.0%} to "
        f"{max(highest):+.0%} off{on_this_card}.",
        "MFU = tokens/s x FLOPs per token / bf16 peak; FLOPs per token = 6 x matmul parameters "
        "active per token (tied head once) + 6 x layers x width x sequence, causal attention as "
        "half of the square; counting all of it, "
        f"{prediction.mfu * whole_square / prediction.flops_per_token:.0%}.",
        f"Loss by {BESIROGLU.source}: another tokenizer and corpus, so compare options and not "
        f"absolute values. A {count(parameters)} model reached {loss} after "
        f"{count(tokens)} tokens (constant learning rate) where the law says "
        f"{BESIROGLU.loss(parameters, tokens):.2f}. Recipes, and when a loss is reached, are "
        "by the law shifted through that run, or to where the run under --metrics has it or should "
        "have it.",
    ]
    if plan.parallelism.ranks > 1:
        lines.append(
            "Of several GPUs only two H200s of one host were measured: efficiency 97% (a) and 96% "
            "(c) with ddp, where 97% is projected, and 93% with fsdp, where 98% is; between which "
            "speeds a run should lie leaves that out, and what is not known of the links. "
            "Counted: ring collectives, 2 (n-1)/n of the bytes for an all-reduce, (n-1)/n for a "
            "reduce-scatter or a gather. ddp reduces bf16 "
            "gradients (fp32 sums with several micro-batches) once a step beside the last "
            "backward; fsdp gathers bf16 weights and reduces fp32 gradients beside forward and "
            "backward of every micro-batch; the embedding's share is never hidden. Not counted: "
            "latency, arithmetic slowed by what is sent beside it. Efficiency is against as many "
            "GPUs, each by itself at the option's own batch."
        )
    if option.model.is_moe:
        lines.append(
            "The law knows dense models only: a mixture of experts is given the range from a dense "
            "model of all its parameters to one of its active ones."
        )
    return lines


def run_findings(run: RunProjection) -> list[str]:
    """They say where a run stands, where it is heading and what holds it up."""
    now, fit, since = run.loss_now, run.projected, ""
    if run.curve.start:
        since = f", {count(run.tokens_seen)} of them since the weights were new"
    slope = f", {fit.slope * 1e9:+.3f} per billion tokens" if fit else ""
    findings = [
        f"`{run.curve.path}`: loss {now:.3f} (perplexity {_perplexity(now)}) after "
        f"{count(run.curve.tokens[-1])} tokens{since}{slope}."
    ]
    if fit:
        end, (low, high) = fit.loss(run.tokens_at_end), fit.interval(run.tokens_at_end)
        schedule = " This takes the learning rate to go on as so far; a fall to come ends lower."
        if run.curve.final_rate is not None:
            schedule = " The interval has room for the rest of the learning rate's schedule."
        findings.append(
            f"At {count(run.end_tokens)} tokens: loss {end:.3f}, 80% interval {low:.3f}-"
            f"{high:.3f}; perplexity {_perplexity(end)}, {_perplexity(low)}-"
            f"{_perplexity(high)}.{schedule}"
        )
    return findings + run.diagnosis()


def screen(analysis: Analysis, *, every_option: bool) -> str:
    """The command prints this Markdown."""
    plan, best = analysis.plan, analysis.recommended.config
    parts = [f"**{_gpus(plan)}, {plan.config.matmul}**"]
    if every_option:
        parts += [
            options_table(analysis.plans, analysis.hours),
            _misfits(analysis),
            f"Recommended: **{best.option}**, {count(best.model.num_parameters())} parameters",
            speed_interval(plan),
        ]
    else:
        parts += [options_table([plan]), memory_table(plan), step_times(plan), speed_interval(plan)]
        parts += communication_findings(plan)
    if analysis.run:
        parts += ["**The run so far**", _bullets(run_findings(analysis.run))]
    rests = caveats(plan)
    if every_option or analysis.law_is_the_runs:
        parts.append(coherence_table(analysis))
    elif analysis.run is None:
        parts += ["**Recipes**", recipes_table(analysis)]
        rests.append(recipes_caveat())
    return "\n\n".join((*parts, "**What this rests on**", _bullets(rests)))


def _command(plan: Plan) -> str:
    """The command starts the run; on each node, where there are several (examples/)."""
    parallelism = plan.parallelism
    launcher, sharded = "python", ""
    if parallelism.ranks > 1:
        nodes = f"--nnodes {parallelism.nodes} " if parallelism.nodes > 1 else ""
        launcher = f"torchrun {nodes}--nproc-per-node {parallelism.gpus_per_node}"
    if parallelism.shards > 1:
        sharded = " --parallel fsdp"
    return (
        f"{launcher} -m hamner.train {shared_flags(plan.config)} --tokens {plan.config.tokens}"
        f"{sharded} --vram-budget {plan.vram_budget / GIB:g}"
    )


TITLE = "# Pre-training plan: option "
"""how every document begins"""


def document(analysis: Analysis, files: str) -> str:
    """The document is the whole analysis as Markdown; its plots lie in the folder `files`."""
    lines = caveats(analysis.plan) + ([] if analysis.run else [recipes_caveat()])
    rests = f"## What this rests on\n\n{_bullets(lines)}\n"
    return "\n\n".join((_situation(analysis, files), _proposal(analysis, files), rests))


def _situation(analysis: Analysis, files: str) -> str:
    plan, gpu, gpus = analysis.plan, analysis.plan.gpu, _gpus(analysis.plan, one="one ")
    parameters, tokens, loss = KNOWN_RUN
    run = ""
    if analysis.run:
        findings = _bullets(run_findings(analysis.run))
        run = f"\n\nThe run so far:\n\n{findings}\n\n![The run so far]({files}/run.png)"
    steps = "\n\n".join((step_times(plan), speed_interval(plan), *communication_findings(plan)))
    return f"""\
{TITLE}{plan.config.option} on {gpus}

## The problem

Train a language model from scratch on {count(plan.config.tokens)} tokens with {gpus}, and know
before starting whether it fits, how long it takes and how good it will be.

## Evidence

A {count(parameters)} model reached a training loss of {loss} (perplexity {math.exp(loss):.0f})
after {count(tokens)} tokens, {tokens / compute_optimal_tokens(parameters):.0%} of its
compute-optimal budget. Above a loss of about {COHERENT_LOSS} its text was incoherent.{run}

## Hardware budget

{gpu.name}: {gpu.bf16_tflops:g} TFLOP/s dense bf16, {gpu.bandwidth_gbs:g} GB/s,
{gpu.memory_gib:g} GiB, of which the run may take {plan.vram_budget / GIB:.1f} GiB\
{" of each" if plan.parallelism.ranks > 1 else ""}.

{memory_table(plan)}

![GiB by policy]({files}/memory.png)

{steps}"""


def _proposal(analysis: Analysis, files: str) -> str:
    plan, best = analysis.plan, analysis.recommended
    option, model = plan.config, plan.config.model
    options = options_table(analysis.plans or [plan], analysis.hours)
    misfits = f"\n\n{_misfits(analysis)}" if analysis.misfits else ""
    has_goal = analysis.run is None or analysis.law_is_the_runs
    coherence = f"\n\n{coherence_table(analysis)}" if has_goal else ""
    if analysis.run is None:
        coherence += f"\n\n{recipes_table(analysis)}"
    return f"""\
## Options

{options}

![Expected loss]({files}/loss.png){misfits}

## Recommendation

Train **{best.config.option}** ({count(best.parameters)} parameters): of the options trained on
their full context it has the lowest loss by the published law after {analysis.hours:,.0f} hours,
a mixture of experts counted by its active parameters. It takes {best.prediction.peak_gib:.1f} GiB
with recompute {describe(best.memory.policies)} and, projected, {_days(best)[0]} days for
{count(best.config.tokens)} tokens at {best.prediction.tokens_per_second:,.0f} tokens/s.

Expected loss: {_range(best.loss_range(BESIROGLU), 2)} by {BESIROGLU.source};
{_range(best.loss_range(HOFFMANN), 2)} by {HOFFMANN.source};
{_range(best.loss_range(analysis.local_law), 2)} by the former shifted through
{"the projected end of the run so far" if analysis.law_is_the_runs else "the model under Evidence"}.

## Training plan

Of option {option.option}{"" if best.config.option == option.option else ", as asked"}:

- `{_command(plan)}`
- {plan.steps:,} steps of {option.batch_size} x {option.seq_len} = {option.tokens_per_step:,}
  tokens, micro-batch {plan.memory.micro_batch_size}.
- {_OPTIMIZERS[option.optimizer]}, {option.warmup_steps:,} steps of warm-up, learning rate
  {option.lr:g} to {option.min_lr:g} ({option.decay} decay).
- {model.num_layers} layers x {model.hidden_size}, {model.num_attention_heads} heads on
  {model.num_kv_heads} key-value heads, vocabulary {model.vocab_size:,}.
- After the first hundred steps, compare tokens/s and peak GiB with this page before leaving it.\
{coherence}"""


def _misfits(analysis: Analysis) -> str:
    return _bullets(f"{name} does not fit: {why}" for name, why in analysis.misfits.items())


def require_report(path: Path) -> None:
    """The function refuses a path that cannot take a report, before one is made.

    Raises:
        UserError: it is a pipe, a device or a folder, its folder does not exist, or it cannot be
            written.
    """
    if is_pipe_or_device(path):
        raise UserError(f"--report {path} is a pipe or a device; name a file, such as plan.md")
    require_writable(path, "--report", begins=TITLE.encode())


def write_report(path: Path, analysis: Analysis) -> None:
    """The function writes Markdown at `path` and its plots in `<stem>_files/` beside it.

    The plots come first and each file is renamed into place, so a report that exists is whole.

    Raises:
        UserError: the file cannot be written, see `require_report`.
    """
    require_report(path)
    files = path.with_name(f"{path.stem}_files")
    with writing(f"--report {path}"):
        files.mkdir(exist_ok=True)
        drawn = {
            "memory.png": _draw_memory(analysis.plan),
            "loss.png": _draw_loss(analysis.plans or [analysis.plan], analysis.local_law),
        }
        if analysis.run:
            drawn["run.png"] = _draw_run(analysis.run)
        for name, axes in drawn.items():
            axes.figure.legend(loc="outside right upper", frameon=False)
            write_whole(files / name, figure_bytes(axes.figure, dpi=150))
        write_whole(path, document(analysis, files.name))


def _axes(xlabel: str, ylabel: str) -> "Axes":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _draw_memory(plan: Plan) -> "Axes":
    axes = _axes(f"--recompute, option {plan.config.option}", "GiB")
    names, plans = zip(*_policies(plan), strict=True)
    names = [name.replace(" (", "\n(") for name in names]
    base = [0.0] * len(names)
    for kind in _kinds(plan.memory.account):
        heights = [_kinds(other.memory.account)[kind] / GIB for other in plans]
        axes.bar(names, heights, bottom=base, label=kind, width=0.6)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    axes.axhline(plan.vram_budget / GIB, color="black", linestyle="--", label="budget")
    return axes


def _draw_loss(plans: Sequence[Plan], law: LossLaw) -> "Axes":
    axes = _axes("days (projected)", "expected loss, nats per token")
    for plan in plans:
        # From a twentieth of the run on: before that the law says little.
        days = [plan.hours / 24 * i / 100 for i in range(5, 101)]
        losses = [law.loss(plan.active_parameters, plan.tokens_in(24 * day)) for day in days]
        axes.plot(days, losses, label=plan.config.option)
    axes.axhline(COHERENT_LOSS, color="black", linestyle=":", label=f"loss {COHERENT_LOSS}")
    return axes


def _draw_run(run: RunProjection) -> "Axes":
    axes = _axes("tokens, billions", "loss, nats per token")
    axes.plot(run.curve.tokens / 1e9, run.curve.loss, ".", markersize=2, color="grey", label="run")
    axes.set(xscale="log")
    if not run.projected:
        return axes
    first, last = 0.1 * run.tokens_seen, run.tokens_at_end
    # Evenly spaced on the logarithmic axis.
    tokens = [first * (last / first) ** (i / 100) for i in range(101)]
    billions = [(run.curve.start + count) / 1e9 for count in tokens]
    bounds = [run.fit.interval(count) for count in tokens]
    axes.fill_between(billions, *zip(*bounds, strict=True), alpha=0.3, label="80% interval")
    axes.plot(billions, [run.fit.loss(count) for count in tokens], label="fit")
    lowest = min(low for low, _ in bounds)
    axes.set(xlim=(billions[0] / 2, billions[-1] / 0.9), ylim=(0.98 * lowest, 1.05 * bounds[0][1]))
    return axes
