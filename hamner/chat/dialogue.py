"""The module holds a conversation with a model that goes on longer than the model's context."""

from collections.abc import Iterator

from hamner.data.chat_template import Message, render_prompt
from hamner.model.generate import Generator, answer
from hamner.model.sampling import Sampling


class Dialogue:
    """A dialogue goes on; its oldest turns are forgotten when the context is full.

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
        """The list is the whole conversation, the system prompt first."""
        return [*self._opening(), *self.turns]

    def clear(self) -> None:
        """The method starts anew, with the same system prompt."""
        self.turns.clear()
        self.forgotten = 0

    def ask(self, text: str, sampling: Sampling, seed: int) -> Iterator[str]:
        """The method says something to the model and gives the pieces of its answer.

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
        """The newest turns, from a question on, are kept that leave a quarter of the context."""
        reserve = min(self.max_new_tokens, self.generator.context // 4)
        starts = [i for i in range(self.forgotten, len(turns)) if turns[i].role == "user"]
        for start in starts:
            prompt = render_prompt([*self._opening(), *turns[start:]], self.generator.tokenizer)
            if len(prompt) + reserve <= self.generator.context:
                break
        return turns[start:]
