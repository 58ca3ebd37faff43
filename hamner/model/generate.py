"""The module generates text from a model, token by token, with a KV cache."""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from hamner.data.chat_template import Message, render_prompt, turn_end_texts, turn_ends
from hamner.data.tokenizer import StreamDecoder, Tokenizer
from hamner.errors import UserError
from hamner.model.kv_cache import KVCache
from hamner.model.sampling import Sampling
from hamner.model.transformer import Transformer

PROMPTS = ("The history of", "In order to", "The most important")
"""What every run continues, so that samples over time can be compared."""
SAMPLE_SAMPLING = Sampling(temperature=0.8, top_k=50, top_p=1.0, repetition_penalty=1.0)
"""How samples over time are drawn."""


STRONGEST_PENALTY = 1e100
"""Beyond it a repetition penalty decides everything already, and only overflows."""


class ContextError(UserError):
    """The exception says that the messages do not fit into the context."""


def choose(
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    penalized: Collection[int] = (),
) -> int:
    """`choose` draws the next token; every setting that `Sampling` allows gives one.

    Args:
        logits: (V,) fp32, on the CPU.
        generator: CPU source of randomness; not used at temperature 0.
        penalized: tokens to which the repetition penalty applies.

    Raises:
        UserError: the logits are not finite, so the model's weights are of no use.
    """
    # In fp32 a temperature of 1e-40 divides by 0 and a top-p of 1e-300 is 0.
    logits = logits.double()
    if not logits.max().isfinite():
        raise UserError(
            "the model's output is not finite: its training diverged; take an earlier checkpoint"
        )
    if penalized and sampling.penalty != 1:
        seen = torch.tensor(sorted(set(penalized)))
        penalty = min(max(sampling.penalty, 1 / STRONGEST_PENALTY), STRONGEST_PENALTY)
        values = logits[seen]
        values = torch.where(values > 0, values / penalty, values * penalty)
        logits = logits.index_put((seen,), values)
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept = min(sampling.top_k or len(logits), len(logits))
    # Sorted, the likeliest first. That one becomes 0, which no temperature makes infinite.
    values, tokens = logits.topk(kept)
    probabilities = ((values - values[0]) / sampling.temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = (before < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[0])
    drawn = torch.multinomial((probabilities * keep).float(), 1, generator=generator)
    return int(tokens[drawn])


class Generator:
    """A generator continues sequences of tokens with one model.

    The KV cache outlives a call: a prompt that begins like the last sequence, as the next turn of
    a conversation does, only costs its new tokens. One sequence at a time; not for several threads.

    Args:
        context: most tokens of a sequence, prompt and continuation; default and at most the
            model's `max_seq_len`, but 2 or more: the last one that it writes it does not see.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, context: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        longest = model.config.max_seq_len
        self.context = max(2, min(context or longest, longest))
        weight = model.layers[0].attention.qkv_proj.weight
        self.cache = KVCache(model.config, self.context, device=weight.device, dtype=weight.dtype)
        self.cached: list[int] = []
        """the tokens whose keys and values the cache holds"""

    @torch.no_grad()
    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, *, seed: int, unpenalized: Collection[int]
    ) -> Iterator[int]:
        """The iterator gives the tokens after `prompt`, until the context is full.

        Args:
            prompt: at least one token.
            seed: any integer, of which torch takes 64 bits.
            unpenalized: tokens that may repeat, such as those that end a turn.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context.
        """
        if not 0 < len(prompt) < self.context:
            raise ValueError(f"{len(prompt)} tokens are no prompt for a context of {self.context}")
        generator = torch.Generator().manual_seed(seed % 2**64)
        sequence = list(prompt)
        while len(sequence) < self.context:
            logits = self._next_logits(sequence)
            penalized = set(sequence).difference(unpenalized)
            sequence.append(choose(logits, sampling, generator, penalized))
            yield sequence[-1]

    def _next_logits(self, sequence: list[int]) -> Tensor:
        """The result is (tokenizer's vocabulary,) fp32 on the CPU: what follows `sequence`."""
        # At least the last token must go through the model.
        shared = 0
        for ours, theirs in zip(self.cached, sequence[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        # Set before the model runs, so that an interrupt leaves a cache that holds what is said.
        self.cached, self.cache.length = sequence[:shared], shared
        device = self.model.embed.weight.device
        inputs = torch.tensor([sequence[shared:]], device=device)
        logits = self.model(inputs, cache=self.cache).logits[0, -1]
        self.cached = list(sequence)
        # Rows of the embedding beyond the tokenizer have no text.
        return logits[: self.tokenizer.vocab_size].float().cpu()


@dataclass(eq=False)
class Completion:
    """A text is given out as it is generated, in pieces none of which ends inside a character."""

    generator: Generator
    """what continues the prompt"""
    prompt: Sequence[int]
    """tokens, at least one and fewer than the context"""
    sampling: Sampling
    max_new_tokens: int | None = None
    """most tokens to generate; None is as many as the context holds"""
    stop_ids: Collection[int] = ()
    """tokens that end the text and are not part of it"""
    stop_texts: Sequence[str] = ()
    """strings that end the text and are not part of it"""
    seed: int = 0
    is_stopped: Callable[[], bool] = lambda: False
    """asked after each token; yes ends the text before it"""
    text: str = field(default="", init=False)
    """what was given out so far"""
    num_tokens: int = field(default=0, init=False)
    """how many were generated, the one that ended the text included"""
    finish_reason: str | None = field(default=None, init=False)
    """"stop" when the model ended the text, "length" when there was no more room; None before the
    end"""

    def __iter__(self) -> Iterator[str]:
        decoder = StreamDecoder(self.generator.tokenizer)
        held = ""
        """decoded, but perhaps the beginning of a stop text"""
        tokens = self.generator.tokens(
            self.prompt, self.sampling, seed=self.seed, unpenalized=self.stop_ids
        )
        # A number that `islice` does not take is more than any context holds.
        limit = None if self.max_new_tokens is None else min(self.max_new_tokens, sys.maxsize)
        for token in islice(tokens, limit):
            if self.is_stopped():
                break
            self.num_tokens += 1
            if token in self.stop_ids:
                self.finish_reason = "stop"
                break
            held += decoder.step(token)
            end = min((i for stop in self.stop_texts if (i := held.find(stop)) >= 0), default=None)
            if end is not None:
                self.finish_reason = "stop"
                yield from self._give(held[:end])
                return
            ready = len(held) - self._possible_stop(held)
            yield from self._give(held[:ready])
            held = held[ready:]
        self.finish_reason = self.finish_reason or "length"
        yield from self._give(held + decoder.finish())

    def run(self) -> str:
        """The text is generated to its end and returned."""
        return "".join(self)

    def _give(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece

    def _possible_stop(self, text: str) -> int:
        """The result is the length of the longest end of `text` that a stop text begins with."""
        longest = max((len(stop) for stop in self.stop_texts), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop_texts):
                return size
        return 0


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = SAMPLE_SAMPLING,
    seed: int = 0,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str:
    """The model continues `prompt` up to its end of text, the context's or `max_new_tokens`, or
    until it is stopped.

    Args:
        prompt: text; without any token, generation starts from the end-of-text token. Of one too
            long for the context, the end is kept.
        max_new_tokens: most tokens to add.

    Returns:
        The continuation only.
    """
    tokens = tokenizer.encode(prompt) or [tokenizer.eot_id]
    generator = Generator(model, tokenizer, context=len(tokens) + max_new_tokens)
    return Completion(
        generator,
        tokens[-(generator.context - 1) :],
        sampling,
        max_new_tokens=max_new_tokens,
        stop_ids={tokenizer.eot_id},
        seed=seed,
        is_stopped=is_stopped,
    ).run()


def answer(
    generator: Generator,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    stop_texts: Sequence[str] = (),
    **settings,
) -> Completion:
    """The function returns the assistant's next turn, not generated yet.

    Args:
        stop_texts: strings that end it, beside those that end a turn.
        settings: further ones of the completion.

    Raises:
        ContextError: the messages leave no room for an answer.
        UserError: the tokenizer lacks the tokens of conversations.
    """
    prompt = render_prompt(messages, generator.tokenizer)
    if len(prompt) >= generator.context:
        raise ContextError(
            f"the messages take {len(prompt):,} tokens, the model's context is "
            f"{generator.context:,}: shorten them"
        )
    settings["stop_ids"] = turn_ends(generator.tokenizer)
    settings["stop_texts"] = (*stop_texts, *turn_end_texts(generator.tokenizer))
    return Completion(generator, prompt, sampling, **settings)
