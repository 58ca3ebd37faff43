"""The module measures how good a model is: loss by source and by position, and samples."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hamner.data.bad_rows import DEFAULT_SHARE
from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.data.chat_template import Message, turn_ends
from hamner.data.conversations.examples import load_examples
from hamner.data.conversations.loader import validation_batch
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.tokenizer import Tokenizer
from hamner.model.attention import document_positions
from hamner.model.generate import PROMPTS, ContextError, Generator, answer, generate
from hamner.model.sampling import Sampling
from hamner.model.transformer import Transformer
from hamner.parallel.device import CPU_MICRO_BATCH_TOKENS
from hamner.progress import SILENT, Status, Task

logger = logging.getLogger(__name__)

Kind = Literal["text", "conversations"]

MAX_LOGITS = 2**26
"""logits held at once: 0.25 GiB in fp32"""
FIRST_BUCKET = 32
"""positions of the first bucket; each later one is as long as all before it"""
GREEDY = Sampling(temperature=0, repetition_penalty=1, top_p=1, top_k=0)
ANSWER_TOKENS = 48
QUESTIONS = ("Hello!", "Who are you?", "What is the capital of France?", "What is 2 + 2?")
"""What every chat model is asked, so that samples can be compared."""


@dataclass(frozen=True)
class HeldOut:
    """The rows are held out of one `--data` or `--conversations` spec."""

    name: str
    kind: Kind
    batch: Batch
    document_mask: bool
    """whether the documents of a row are kept from attending to each other"""


@dataclass(frozen=True)
class SourceResult:
    """The result says how a model does on one source.

    Attributes:
        name: the spec, as the user wrote it.
        kind: whether it was read as text or as conversations.
        tokens: targets that count: every token of text, of conversations those of the answers.
        loss: their mean cross-entropy, nats a token; None without any.
        perplexity: exp(loss).
        bits_per_byte: cross-entropy of the tokens that are text, in bits, by the bytes of that
            text, so that tokenizers compare; None without any.
        loss_by_position: mean loss of the targets after so many tokens of context, by the range of
            positions, such as "32-63".
    """

    name: str
    kind: Kind
    tokens: int
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    loss_by_position: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A sample is a prompt and what the model made of it."""

    prompt: str
    text: str


def open_held_out(
    kind: Kind,
    specs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    max_tokens: int,
    val_fraction: float,
    document_mask: bool,
    bad_rows: float = DEFAULT_SHARE,
    status: Status = SILENT,
) -> list[HeldOut]:
    """The function packs what is held out of every source as training does.

    Args:
        kind: text, packed as pre-training does, or conversations, packed as fine-tuning does.
        specs: as for `hamner.train` or `hamner.sft`, without weights.
        tokenizer: of the model.
        seq_len: T.
        max_tokens: most tokens of a source.
        val_fraction: share held out; that of the training, so that nothing trained on is met.
        document_mask: whether the documents of a row are kept apart, as conversations always are.
        bad_rows: share of a source's rows that may be passed over, as in the training.
        status: shows how far it is.

    Raises:
        UserError: a source that cannot be read.
    """
    sources = []
    for spec in specs:
        config = DataConfig(
            (spec,),
            seq_len,
            batch_size=1,
            seed=0,
            val_fraction=val_fraction,
            bad_rows=bad_rows,
        )
        if kind == "text":
            batch = TrainLoader(config, tokenizer).validation_rows(max_tokens, status)
        else:
            examples = load_examples(config, tokenizer, status)
            for text in examples[0].describe_unusable():
                logger.warning("%s: left out, %s", spec, text)
            batch = validation_batch(examples, tokenizer, seq_len, max_tokens)
        sources.append(HeldOut(spec, kind, batch, document_mask))
    return sources


def evaluate_source(
    model: Transformer, tokenizer: Tokenizer, source: HeldOut, status: Status = SILENT
) -> SourceResult:
    """The function computes loss, perplexity, bits per byte and loss by position on one source.

    Args:
        status: shows how far it is.
    """
    batch = source.batch
    with status.task(f"evaluating on {source.name}", len(batch.inputs), "sequences") as task:
        losses = token_losses(model, batch, document_mask=source.document_mask, task=task)
    kept = batch.targets != IGNORED_TARGET
    tokens = int(kept.sum())
    if not tokens:
        return SourceResult(source.name, source.kind, tokens=0)
    loss = losses[kept].mean().item()
    if source.document_mask:
        positions = document_positions(batch.document_ids)
    else:
        positions = torch.arange(batch.inputs.shape[1]).expand_as(batch.inputs)
    ends = turn_ends(tokenizer) if source.kind == "conversations" else {tokenizer.eot_id}
    is_text = kept & ~torch.isin(batch.targets, torch.tensor(sorted(ends)))
    # The rows follow each other without a gap, so no character is divided between them.
    size = len(tokenizer.decode(batch.targets[is_text].tolist()).encode())
    return SourceResult(
        name=source.name,
        kind=source.kind,
        tokens=tokens,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=losses[is_text].sum().item() / math.log(2) / size if size else None,
        loss_by_position=loss_by_position(losses, positions, kept),
    )


@torch.no_grad()
def token_losses(
    model: Transformer,
    batch: Batch,
    *,
    document_mask: bool,
    task: Task,
) -> Tensor:
    """The function computes the cross-entropy of every target, a few rows at a time, which the task
    counts.

    Returns:
        (B, T) float64 on the CPU, nats; 0 where the target is ignored.
    """
    device = model.embed.weight.device
    rows, seq_len = batch.inputs.shape
    tokens = MAX_LOGITS // model.config.vocab_size
    if device.type == "cpu":
        # The count goes on with each pass.
        tokens = min(tokens, CPU_MICRO_BATCH_TOKENS)
    step = max(1, tokens // seq_len)
    losses = [torch.empty((0, seq_len), dtype=torch.float64)]
    for start in range(0, rows, step):
        part = slice(start, start + step)
        documents = batch.document_ids[part].to(device) if document_mask else None
        logits = model(batch.inputs[part].to(device), document_ids=documents).logits
        cross_entropy = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            batch.targets[part].flatten().to(device),
            ignore_index=IGNORED_TARGET,
            reduction="none",
        )
        losses.append(cross_entropy.double().cpu().view(-1, seq_len))
        task.advance(len(cross_entropy) // seq_len)
    return torch.cat(losses)


def loss_by_position(losses: Tensor, positions: Tensor, kept: Tensor) -> dict[str, float]:
    """The function averages the loss of the kept targets in ranges of positions that double.

    Args:
        losses: (B, T).
        positions: (B, T) int, of the inputs in their context, from 0.
        kept: (B, T) bool.

    Returns:
        By range, "0-31", "32-63", "64-127" ..., those with a target alone.
    """
    means = {}
    low, high = 0, FIRST_BUCKET
    while low < positions.shape[1]:
        chosen = kept & (positions >= low) & (positions < high)
        if chosen.any():
            means[f"{low}-{min(high, positions.shape[1]) - 1}"] = losses[chosen].mean().item()
        low, high = high, 2 * high
    return means


def samples(
    model: Transformer, tokenizer: Tokenizer, *, is_chat: bool, status: Status = SILENT
) -> list[Sample]:
    """The function has a chat model answer fixed questions, any other continue fixed prompts.

    Answers are the likeliest ones. A question that the model's context is too short for is left
    out, and a warning says so.
    """
    generator = Generator(model, tokenizer) if is_chat else None

    def reply(question: str) -> str:
        messages = [Message("user", question)]
        completion = answer(generator, messages, GREEDY, max_new_tokens=ANSWER_TOKENS, seed=0)
        return completion.run().strip()

    chosen, prompts = [], QUESTIONS if is_chat else PROMPTS
    with status.task("sampling", len(prompts), "prompts") as task:
        for prompt in prompts:
            try:
                text = reply(prompt) if is_chat else generate(model, tokenizer, prompt)
                chosen.append(Sample(prompt, text))
            except ContextError:
                logger.warning(
                    "the sample %r is left out: the model's context of %d tokens has no room for "
                    "the question and an answer",
                    *(prompt, generator.context),
                )
            task.advance()
    return chosen
