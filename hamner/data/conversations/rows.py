"""A row of a file becomes the messages of a conversation, in whichever form people keep it.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey!"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey!"}]}
    {"prompt": "Hi", "completion": "Hey!"}
    {"instruction": "Greet", "input": "Al", "output": "Hey Al!"}
    {"text": "<|user|>\\nHi\\n<|assistant|>\\nHey!\\n"}

docs/chatbot.md has all that is read. Fields that are null count as absent: tables have them where
another row has a value.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hamner.data.chat_template import END_TOKEN, ROLE_TOKENS, Message, Role
from hamner.data.tokenizer import END_OF_TEXT
from hamner.files import parse_json

#: The roles by the names that are seen in `role` and in ShareGPT's `from`, in small letters.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"
    ),
}
#: The template has no role for tools: the assistant says a call, the user says what came of it.
TOOL_CALLS = ("tool_call", "function_call")
TOOL_RESULTS = ("tool", "function", "tool_response", "observation", "ipython")

LISTS = ("messages", "conversations", "conversation")
#: A question and its answer in fields of their own; the first pair that a row has is taken.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
)
#: What "instruction" is about: Alpaca's name, Dolly's.
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
FIELDS = tuple(
    dict.fromkeys([*LISTS, "text", *(n for pair in PAIRS for n in pair), *INPUTS, *SYSTEMS])
)
"""all fields of a row that are read"""
TEXT_PARTS = ("text", "input_text", "output_text")

_TURN = re.compile("|".join(map(re.escape, ROLE_TOKENS.values())))
_TOKEN_ROLES = {token: role for role, token in ROLE_TOKENS.items()}


def parse_conversation(row: Any) -> tuple[Message, ...]:
    """The row has messages in any of the forms; at least one.

    Raises:
        ValueError: with half a sentence that says what is wrong; the caller adds file and line.
    """
    if isinstance(row, list) and row and all(isinstance(message, dict) for message in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError("a conversation must be a JSON object")
    given = _present(row)
    messages = _parse_fields(given)
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]  # as chat begins where no system prompt is given
    if not messages:
        raise ValueError("holds no message")
    system = next((given[name] for name in SYSTEMS if name in given), "")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    for message in messages:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half a surrogate pair, which is no text") from error
    return messages


def _present(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def _parse_fields(row: dict) -> tuple[Message, ...]:
    for name in LISTS:
        if name in row:
            return _parse_list(row[name], name)
    pair = next((pair for pair in PAIRS if row.keys() >= set(pair)), None)
    text = row.get("text")
    # Alpaca's rows have a "text" too, which repeats the others without any role token.
    if pair and not (isinstance(text, str) and _TURN.match(text.lstrip())):
        return _parse_pair(row, *pair)
    if "text" in row:
        return _parse_text(text)
    found = ", ".join(map(str, row)) or "nothing"
    raise ValueError(
        'has no field "messages", "conversations" or "text", and no pair such as "prompt" and '
        f'"completion" (it has {found})'
    )


def _parse_pair(row: dict, question: str, answer: str) -> tuple[Message, ...]:
    """Either may also be a list of messages; answers within the question are not learned."""
    asked = _parse_side(row[question], question, "user")
    about = next((row[name] for name in INPUTS if name in row), "")
    if question == "instruction" and about:
        if not isinstance(about, str):
            raise ValueError('"input" must be a string')
        asked = (*asked[:-1], replace(asked[-1], content=f"{asked[-1].content.strip()}\n{about}"))
    given = (replace(m, learned=False) if m.role == "assistant" else m for m in asked)
    return (*given, *_parse_side(row[answer], answer, "assistant"))


def _parse_side(value: Any, name: str, role: Role) -> tuple[Message, ...]:
    if isinstance(value, list) and value:
        return _parse_list(value, name)
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string')
    return (Message(role, value),)


def _parse_list(rows: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(rows, list):
        raise ValueError(f'"{name}" must be a list')
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'"{name}" holds a message that is no object')
    return tuple(_parse_message(_present(row), name) for row in rows)


def _parse_message(row: dict, name: str) -> Message:
    role = row.get("role", row.get("from"))
    content = row.get("content", row.get("value"))
    calls = row.get("tool_calls") or row.get("function_call")
    kind = role.strip().lower() if isinstance(role, str) else None
    # An assistant that calls a tool, or says nothing, often has no content.
    if kind is None or (content is None and ROLES.get(kind) != "assistant"):
        raise ValueError(
            f'"{name}" holds a message without "role" and "content" (or "from" and "value")'
        )
    text = "" if content is None else _text_of(content)
    if kind in TOOL_CALLS:
        return Message("assistant", _tagged("tool_call", text), _is_learned(row))
    if kind in TOOL_RESULTS:
        return Message("user", _tagged("tool_response", text))
    if kind not in ROLES:
        raise ValueError(f'has the role "{role}", not one of {", ".join([*ROLES, *TOOL_RESULTS])}')
    if calls and ROLES[kind] == "assistant":
        text = "\n".join(filter(None, [text.strip(), *_spell_calls(calls)]))
    return Message(ROLES[kind], text, _is_learned(row))


def _text_of(content: Any) -> str:
    """The content is a string, or OpenAI's list of parts, which must all be text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError('has a "content" that is neither a string nor a list of parts')
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS:
            part = part.get("text")
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f'has a "content" with a part that is no text ({kind})')
        texts.append(part)
    return "".join(texts)


def _is_learned(row: dict) -> bool:
    weight = row.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError('has a "weight" other than 0, not learned, and 1')
    return weight == 1


def _spell_calls(calls: Any) -> Iterable[str]:
    """The calls are spelled as Hermes and Qwen do, an object between tags each."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("has a tool call without the name of a function")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except ValueError:
                raise ValueError("has a tool call whose arguments are not JSON") from None
        spelled = {"name": function["name"], "arguments": arguments}
        yield _tagged("tool_call", json.dumps(spelled, ensure_ascii=False, default=str))


def _tagged(tag: str, text: str) -> str:
    """The text stands between tags, which it may have already."""
    return text if f"<{tag}>" in text else f"<{tag}>\n{text.strip()}\n</{tag}>"


def _parse_text(text: Any) -> tuple[Message, ...]:
    """Role tokens open the turns; end tokens at a turn's end are not part of its content."""
    if not isinstance(text, str):
        raise ValueError('"text" must be a string')
    openings = list(_TURN.finditer(text))
    if not openings or text[: openings[0].start()].strip():
        raise ValueError(f'"text" must begin with one of {", ".join(ROLE_TOKENS.values())}')
    ends = [opening.start() for opening in openings[1:]] + [len(text)]
    messages = []
    for opening, end in zip(openings, ends, strict=True):
        content = text[opening.end() : end].strip().removesuffix(END_OF_TEXT).rstrip()
        content = content.removesuffix(END_TOKEN).strip()
        messages.append(Message(_TOKEN_ROLES[opening.group()], content))
    return tuple(messages)
