"""The tests hold one conversation in all forms that people keep it in, and what is none."""

import pytest

from hamner.data.chat_template import Message
from hamner.data.conversations.rows import parse_conversation

HI = (Message("user", "Hi"), Message("assistant", "Hey!"))
WITH_SYSTEM = (Message("system", "Be terse."), *HI)


def listed(field: str, role: str, content: str, *roles: str) -> dict:
    """The function gives `WITH_SYSTEM` as a list of messages, with keys and roles of one's own."""
    texts = [message.content for message in WITH_SYSTEM]
    return {field: [{role: r, content: t} for r, t in zip(roles, texts, strict=True)]}


def message(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        listed("messages", "role", "content", "system", "user", "assistant"),
        listed("messages", "role", "content", "System", "User", "ASSISTANT"),
        listed("messages", "role", "content", "developer", " human", "ChatGPT"),
        listed("messages", "from", "value", "system", "human", "gpt"),
        listed("conversations", "from", "value", "system", "Human", "GPT"),
        listed("conversations", "from", "value", "system", "user", "bing"),
        listed("conversations", "role", "content", "system", "user", "assistant"),
        listed("conversation", "role", "content", "system", "prompter", "model"),
        listed("messages", "role", "content", "system", "user", "assistant")["messages"],
        {
            "messages": [
                message("system", parts("Be ", "terse.")),
                message("user", ["Hi"]),
                message("assistant", parts("Hey!"), tool_calls=None, weight=None),
            ]
        },
        {"system": "Be terse.", "messages": [message("user", "Hi"), message("assistant", "Hey!")]},
        {
            "system": "Of all rows.",
            **listed("messages", "role", "content", "system", "user", "assistant"),
        },
        {"prompt": "Hi", "response": "no", "completion": "Hey!", "system": "Be terse."},
        {"messages": None, "system": "Be terse.", "prompt": "Hi", "completion": "Hey!"},
        {"system_prompt": "Be terse.", "question": "Hi", "response": "Hey!"},
        {"prompt": [message("system", "Be terse."), message("user", "Hi")], "completion": "Hey!"},
        {
            "prompt": [message("system", "Be terse."), message("user", "Hi")],
            "completion": [message("assistant", "Hey!")],
        },
        {"system": "Be terse.", "instruction": "Hi", "input": "", "output": "Hey!"},
        {"system": "Be terse.", "instruction": "Hi", "output": "Hey!", "text": "Below is Hi"},
        {"text": "<|system|>\nBe terse.\n<|user|>\nHi\n<|assistant|>\nHey!\n", "prompt": "x"},
        {"text": "<|system|>Be terse.<|user|>Hi<|assistant|>Hey!<|end|><|endoftext|>"},
    ],
)
def test_one_conversation_in_many_forms(row):
    assert parse_conversation(row) == WITH_SYSTEM


def test_a_blank_system_prompt_is_none():
    """As in chat, which then begins with the question."""
    for blank in ("", " \n"):
        turns = listed("messages", "role", "content", "system", "user", "assistant")["messages"]
        turns[0]["content"] = blank
        assert parse_conversation({"messages": turns}) == HI
        assert parse_conversation({"messages": turns, "system": "Be terse."}) == WITH_SYSTEM
        with pytest.raises(ValueError, match="holds no message"):
            parse_conversation({"messages": turns[:1]})


@pytest.mark.parametrize("field", ["input", "context"])
def test_an_instruction_comes_with_what_it_is_about(field):
    row = {"instruction": "Add.", field: "2 + 2", "output": "4"}
    assert parse_conversation(row) == (Message("user", "Add.\n2 + 2"), Message("assistant", "4"))


def test_tools_are_spelled_in_the_turns():
    call = {"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"at": "Rom"}'}}
    spelled = '<tool_call>\n{"name": "w", "arguments": {"at": "Rom"}}\n</tool_call>'
    result = "<tool_response>\nsunny\n</tool_response>"
    expected = (
        Message("user", "Weather?"),
        Message("assistant", spelled),
        Message("user", result),
        Message("assistant", "It is sunny."),
    )
    ask, end = message("user", "Weather?"), message("assistant", "It is sunny.")
    old = {"name": "w", "arguments": {"at": "Rom"}}
    for middle in (
        [message("assistant", None, tool_calls=[call]), message("tool", "sunny", tool_call_id="1")],
        [message("assistant", "", function_call=old), message("function", parts("sunny"))],
        [
            {"from": "function_call", "value": '{"name": "w", "arguments": {"at": "Rom"}}'},
            {"from": "observation", "value": "sunny"},
        ],
        [message("assistant", spelled), message("tool", result)],
    ):
        assert parse_conversation({"messages": [ask, *middle, end]}) == expected
    two = parse_conversation(
        {"messages": [message("assistant", "Let me see.", tool_calls=[call] * 2)]}
    )
    assert two[0].content == f"Let me see.\n{spelled}\n{spelled}"


def test_an_answer_of_weight_0_is_not_learned():
    turns = [message("user", "Hi"), message("assistant", "Yo", weight=0)]
    turns += [{"from": "gpt", "value": "Hey!", "weight": 1.0}]
    found = parse_conversation({"messages": turns})
    assert [turn.learned for turn in found] == [True, False, True]
    prompt = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    found = parse_conversation({"prompt": prompt, "completion": "d"})
    assert [turn.learned for turn in found] == [True, False, True, True]


def test_an_answer_without_content_is_empty():
    assert parse_conversation({"messages": [message("assistant", None)]})[0].content == ""


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (["Hi"], "must be a JSON object"),
        ([], "must be a JSON object"),
        ({"prompt": "Hi"}, "it has prompt"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "it has prompt, chosen, rejected"),
        ({"prompt": "Hi", "completion": 5}, '"completion" must be a string'),
        ({"instruction": "Hi", "input": 5, "output": "x"}, '"input" must be a string'),
        ({}, "it has nothing"),
        ({"messages": "Hi"}, '"messages" must be a list'),
        ({"messages": ["Hi"]}, "a message that is no object"),
        ({"messages": []}, "holds no message"),
        ({"messages": [{"role": "user"}]}, '"role" and "content"'),
        ({"messages": [message("user", None)]}, '"role" and "content"'),
        ({"messages": [message(None, "x")]}, '"role" and "content"'),
        ({"messages": [message("user", 5)]}, "neither a string nor a list of parts"),
        ({"messages": [message("user", [{"type": "image_url"}])]}, "no text (image_url)"),
        ({"messages": [message("user", [{"type": "text"}])]}, "no text (NoneType)"),
        ({"messages": [message("user", [{"type": "text", "text": 5}])]}, "no text (int)"),
        ({"messages": [message("assistant", "x", weight=0.5)]}, 'a "weight" other than 0'),
        ({"messages": [message("assistant", "x", weight=True)]}, 'a "weight" other than 0'),
        ({"messages": [message("assistant", None, tool_calls=[{}])]}, "without the name"),
        ({"messages": [message("assistant", "", function_call="w")]}, "without the name"),
        (
            {"messages": [message("assistant", "", function_call={"name": "w", "arguments": "{"})]},
            "arguments are not JSON",
        ),
        ({"conversations": [{"from": "robot", "value": "x"}]}, 'the role "robot"'),
        ({"text": 5}, '"text" must be a string'),
        ({"text": "Just prose."}, "must begin with one of <|system|>"),
        ({"text": "Prose <|user|>\nHi"}, "must begin with one of <|system|>"),
        ({"text": "<|user|>\n\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_row_that_is_no_conversation(row, named):
    with pytest.raises(ValueError) as caught:
        parse_conversation(row)
    assert named in str(caught.value)
