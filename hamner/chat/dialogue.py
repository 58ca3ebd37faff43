"""A conversation with a model: what both the terminal and the server do with messages."""

from collections.abc import Iterator, Sequence

from hamner.data.chat_template import END_TOKEN, ROLE_TOKENS, Message, render_prompt
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.model.generate import Completion, Generator
from hamner.model.sampling import Sampling


class ContextError(UserError):
    """The messages do not fit into the context."""


def answer(
    generator: Generator,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_texts: Sequence[str] = (),
    seed: int,
) -> Completion:
    """The assistant's next turn, not generated yet.

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
    return Completion(
        generator,
        prompt,
        sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=turn_ends(generator.tokenizer),
        stop_texts=stop_texts,
        seed=seed,
    )


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: its end marker, the end of the text, or anyone's next turn."""
    names = (END_TOKEN, *ROLE_TOKENS.values())
    return frozenset({tokenizer.eot_id, *(tokenizer.special_id(name) for name in names)})


class Dialogue:
    """A conversation that goes on; its oldest turns are forgotten when the context is full.

    Args:
        generator: the model.
        system: the system prompt; empty is none.
        max_new_tokens: most tokens of an answer.

    Attributes:
        turns: what user and assistant said, nothing forgotten.
        forgotten: how many of the oldest turns the model no longer sees.
    """

    def __init__(self, generator: Generator, system: str, max_new_tokens: int) -> None:
        self.generator, self.system, self.max_new_tokens = generator, system, max_new_tokens
        self.turns: list[Message] = []
        self.forgotten = 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation, the system prompt first."""
        return [*self._opening(), *self.turns]

    def clear(self) -> None:
        """Start anew, with the same system prompt."""
        self.turns.clear()
        self.forgotten = 0

    def ask(self, text: str, sampling: Sampling, seed: int) -> Iterator[str]:
        """Say something; gives the pieces of the answer.

        The pieces given out are part of the conversation even if the iteration is left early.

        Returns:
            Through the iterator: why the answer ended, "stop" or "length".

        Raises:
            ContextError: the text alone does not fit; the conversation is as it was.
        """
        question = Message("user", text)
        seen = self._fit([*self.turns, question])
        completion = answer(
            self.generator,
            [*self._opening(), *seen],
            sampling,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
        )
        self.forgotten = len(self.turns) + 1 - len(seen)
        self.turns.append(question)
        try:
            yield from completion
        finally:
            self.turns.append(Message("assistant", completion.text))
        return completion.finish_reason

    def _opening(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []

    def _fit(self, turns: list[Message]) -> list[Message]:
        """The newest turns, from a question on, that leave a quarter of the context to answer."""
        reserve = min(self.max_new_tokens, self.generator.context // 4)
        starts = [i for i in range(self.forgotten, len(turns)) if turns[i].role == "user"]
        for start in starts:
            prompt = render_prompt([*self._opening(), *turns[start:]], self.generator.tokenizer)
            if len(prompt) + reserve <= self.generator.context:
                break
        return turns[start:]
