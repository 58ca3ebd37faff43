"""Only the chat template says how a conversation is spelled in tokens.

    <|system|>
    You are terse.
    <|user|>
    What is 2 + 2?
    <|assistant|>
    4.<|end|>

A role is a special token and a line break; what the system and the user say ends with a line
break, what the assistant says with the special token `<|end|>`, right after which the next role
comes. Contents are stripped. Text that looks like a special token is ordinary text here: no
content can open another's turn.

A model that comes from elsewhere may have read the tags as ordinary text (`Tokenizer.text_tags`).
There every turn is its tag, a line break, its content and a line break; the end of the text comes
only after the last answer, so that an answer also ends where the text of a tag begins
(`turn_end_texts`). Content that spells a tag opens a turn there.

    <|user|>
    What is 2 + 2?
    <|assistant|>
    4.
    <|endoftext|>

Fine-tuning, chat and evaluation render with the functions below, which raise a `UserError` where a
tokenizer lacks the special tokens it should have; exported tokenizers render with `jinja_template`.
A test holds the two together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from hamner.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

ROLE_TOKENS: dict[Role, str] = {role: f"<|{role}|>" for role in get_args(Role)}
END_TOKEN = "<|end|>"
"""ends what the assistant says; decoding stops at it"""

JINJA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim }}"
    "{{ '<|end|>' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""the same template for Hugging Face tokenizers (`tokenizer.chat_template`)"""
TEXT_TAGS_JINJA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""that of tags in ordinary text"""


@dataclass(frozen=True)
class Message:
    """A message is one turn of a conversation."""

    role: Role
    content: str
    learned: bool = True
    """whether fine-tuning learns it, if it is the assistant's"""


class Rendered(NamedTuple):
    """A conversation, or a part of it, is rendered in tokens."""

    ids: list[int]
    learned: list[bool]
    """whether fine-tuning learns to write each token: the assistant's words and `<|end|>`"""


def render_message(message: Message, tokenizer: Tokenizer) -> Rendered:
    """An answer without a word is not learned: it would teach to say nothing."""
    if tokenizer.text_tags:
        return _render_text_tags(message, tokenizer)
    head, text, end = _spelled(message)
    ids = [tokenizer.special_id(head)]
    if message.role != "assistant":
        ids += tokenizer.encode_inside(text)
        return Rendered(ids, [False] * len(ids))
    opening, whole = tokenizer.encode_inside("\n"), tokenizer.encode_inside(text)
    ids += opening
    # In a prompt the line break comes before the answer is known, so it keeps its tokens here even
    # if the tokenizer would join it with the answer.
    is_joined = whole[: len(opening)] != opening
    answer = tokenizer.encode_inside(text[1:]) if is_joined else whole[len(opening) :]
    answer.append(tokenizer.special_id(end))
    is_learned = bool(message.content.strip())
    return Rendered(ids + answer, [False] * len(ids) + [is_learned] * len(answer))


def _spelled(message: Message) -> tuple[str, str, str]:
    """The message is a special token, text, and the special token that ends it or nothing."""
    content = message.content.strip()
    if message.role == "assistant":
        return ROLE_TOKENS[message.role], f"\n{content}", END_TOKEN
    return ROLE_TOKENS[message.role], f"\n{content}\n", ""


def spell(messages: Iterable[Message], *, text_tags: bool = False) -> str:
    """The text is what the Jinja template makes of a conversation."""
    spelled = _spelled_with_text_tags if text_tags else _spelled
    return "".join(part for message in messages for part in spelled(message))


def _render_text_tags(message: Message, tokenizer: Tokenizer) -> Rendered:
    head, body = map(tokenizer.encode, _spelled_with_text_tags(message))
    is_learned = message.role == "assistant"
    return Rendered(head + body, [False] * len(head) + [is_learned] * len(body))


def _spelled_with_text_tags(message: Message) -> tuple[str, str]:
    """The message is the text of its tag, and that of its content if it has any."""
    head, content = f"{ROLE_TOKENS[message.role]}\n", message.content.strip()
    # Two line breaks may be one token.
    return (head, f"{content}\n") if content else (f"{head}\n", "")


def render_end(tokenizer: Tokenizer) -> Rendered:
    """The end is what fine-tuning has after the last answer of a conversation."""
    return Rendered([tokenizer.eot_id], [True]) if tokenizer.text_tags else Rendered([], [])


def render(messages: Iterable[Message], tokenizer: Tokenizer) -> Rendered:
    """A whole conversation is rendered as the concatenation of its messages."""
    parts = [render_message(message, tokenizer) for message in messages]
    return Rendered(
        [token for part in parts for token in part.ids],
        [learned for part in parts for learned in part.learned],
    )


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The prompt is the conversation so far and the opening of the assistant's next turn."""
    if tokenizer.text_tags:
        opening = tokenizer.encode(f"{ROLE_TOKENS['assistant']}\n")
    else:
        head = tokenizer.special_id(ROLE_TOKENS["assistant"])
        opening = [head, *tokenizer.encode_inside("\n")]
    return render(messages, tokenizer).ids + opening


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """An answer ends at its end marker, the end of the text, or anyone's next turn."""
    names = () if tokenizer.text_tags else (END_TOKEN, *ROLE_TOKENS.values())
    return frozenset({tokenizer.eot_id, *(tokenizer.special_id(name) for name in names)})


def turn_end_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts end an answer as the tokens of `turn_ends` do, and the line break before them."""
    tags = ROLE_TOKENS.values() if tokenizer.text_tags else ()
    return tuple(f"{line_break}{tag}" for tag in tags for line_break in ("\n", ""))


def jinja_template(tokenizer: Tokenizer) -> str:
    """The template renders as `render` and `render_prompt` do, for Hugging Face tokenizers."""
    return TEXT_TAGS_JINJA_TEMPLATE if tokenizer.text_tags else JINJA_TEMPLATE
