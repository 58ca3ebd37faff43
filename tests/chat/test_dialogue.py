"""Conversations: what the model is shown, and what is forgotten when the context is full."""

import pytest

from hamner.chat.dialogue import Dialogue
from hamner.data.chat_template import Message, render_prompt, turn_ends
from hamner.data.tokenizer import load_tokenizer
from hamner.model.generate import ContextError, answer
from hamner.model.sampling import Sampling
from tests.scripted import Script

GREEDY = Sampling(temperature=0)
END = 4


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    return load_tokenizer(vocab_size=261)


def dialogue(tokenizer, says: str, *, context: int = 1000, system: str = "", new: int = 512):
    script = Script(tokenizer, [*tokenizer.encode(says), END], context)
    return Dialogue(script, system, new), script


def test_the_model_sees_the_whole_conversation_in_the_template(tokenizer):
    talk, script = dialogue(tokenizer, "Hey!", system="Be terse.")
    assert "".join(talk.ask("Hi", GREEDY, 0)) == "Hey!"
    assert "".join(talk.ask("Bye", GREEDY, 0)) == "Hey!"
    messages = [
        Message("system", "Be terse."),
        Message("user", "Hi"),
        Message("assistant", "Hey!"),
        Message("user", "Bye"),
        Message("assistant", "Hey!"),
    ]
    assert talk.messages == messages
    assert script.prompts == [
        render_prompt(messages[:2], tokenizer),
        render_prompt(messages[:4], tokenizer),
    ]
    talk.clear()
    assert talk.messages == messages[:1]


def reason(pieces) -> str:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def test_why_an_answer_ended(tokenizer):
    talk, _ = dialogue(tokenizer, "four")
    assert reason(talk.ask("Hi", GREEDY, 0)) == "stop"
    talk.max_new_tokens = 3
    assert reason(talk.ask("Hi", GREEDY, 0)) == "length"
    assert talk.turns[-1] == Message("assistant", "fou")


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end|>", "<|user|>", "<|system|>"])
def test_anything_that_is_not_the_assistants_ends_its_turn(tokenizer, name):
    script = Script(tokenizer, [*tokenizer.encode("Hi"), tokenizer.special_id(name), 99])
    completion = answer(script, [Message("user", "?")], GREEDY, max_new_tokens=9, seed=0)
    assert completion.run() == "Hi"
    assert tokenizer.special_id(name) in turn_ends(tokenizer)


def test_an_answer_left_early_is_part_of_the_conversation(tokenizer):
    talk, _ = dialogue(tokenizer, "A long answer")
    pieces = talk.ask("Hi", GREEDY, 0)
    assert next(pieces) + next(pieces) == "A "
    pieces.close()
    assert talk.turns[-1] == Message("assistant", "A ")


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tokenizer):
    """6 tokens of system prompt, 21 a pair of turns, 13 to ask: two pairs fit with the reserve."""
    talk, script = dialogue(tokenizer, "1234567", context=84, system="Sys")
    for number in range(4):
        list(talk.ask(f"asking {number}", GREEDY, 0))
        assert len(script.prompts[-1]) + 84 // 4 <= 84
    seen = [talk.messages[0], *talk.messages[3:8]]
    assert script.prompts[-1] == render_prompt(seen, tokenizer)
    assert talk.forgotten == 2
    # Nothing is lost for who asks for the conversation.
    assert len(talk.messages) == 9
    # What was forgotten stays so, even if there is room again.
    talk.system = ""
    list(talk.ask("x", GREEDY, 0))
    assert script.prompts[-1] == render_prompt(talk.messages[4:-1], tokenizer)


def test_a_question_too_long_for_the_context_changes_nothing(tokenizer):
    talk, script = dialogue(tokenizer, "Hey!", context=40)
    list(talk.ask("Hi", GREEDY, 0))
    before = list(talk.turns)
    with pytest.raises(ContextError, match="messages take 105 tokens.* context is 40"):
        list(talk.ask("x" * 100, GREEDY, 0))
    assert (talk.turns, talk.forgotten) == (before, 0)
    assert len(script.prompts) == 1
    # One that leaves less than the reserve is still answered, as far as there is room.
    assert reason(talk.ask("x" * 32, GREEDY, 0)) == "length"
    assert talk.turns[-1] == Message("assistant", "Hey")
