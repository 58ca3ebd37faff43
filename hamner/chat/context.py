"""The module says what a full context forgets: the oldest turns, the beginning of a text."""

from collections.abc import Sequence
from itertools import accumulate

from hamner.data.chat_template import Message, render_message, render_prompt
from hamner.model.generate import Generator


def newest_messages(
    messages: Sequence[Message], generator: Generator, max_new_tokens: int
) -> list[Message]:
    """The newest turns, from a question on, are kept that leave a quarter of the context, or
    `max_new_tokens` if those are fewer; so are the system messages before them. The last question
    is kept even if it leaves less.
    """
    tokenizer, context = generator.tokenizer, generator.context
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    opening, turns = list(messages[:first]), list(messages[first:])
    room = context - min(max_new_tokens, context // 4) - len(render_prompt(opening, tokenizer))
    sizes = [len(render_message(turn, tokenizer).ids) for turn in turns]
    questions = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if not questions:
        return [*opening, *turns]
    # Newest first, so that each size is added once.
    size_from = list(accumulate(reversed(sizes)))[::-1]
    start = next((i for i in questions if size_from[i] <= room), questions[-1])
    return [*opening, *turns[start:]]


def newest_tokens(
    tokens: Sequence[int], generator: Generator, max_new_tokens: int
) -> Sequence[int]:
    """The last tokens of a text are kept that leave a quarter of the context, or `max_new_tokens`
    if those are fewer."""
    context = generator.context
    return tokens[-(context - min(max_new_tokens, context // 4)) :]
