"""The module asks a chat model for its next turn in a conversation."""

from collections.abc import Sequence

from hamner.data.chat_template import Message, render_prompt, turn_ends
from hamner.errors import UserError
from hamner.model.generate import Completion, Generator
from hamner.model.sampling import Sampling


class ContextError(UserError):
    """The exception says that the messages do not fit into the context."""


def answer(
    generator: Generator,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_texts: Sequence[str] = (),
    seed: int,
) -> Completion:
    """The function returns the assistant's next turn, not generated yet.

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
