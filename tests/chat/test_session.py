"""The tests hold what the model is shown, and what is forgotten when the context is full."""

import contextlib
import itertools

import pytest
import tokenizers
from tokenizers import models

from hamner.chat.config import ChatConfig
from hamner.chat.context import newest_messages
from hamner.chat.session import Chat, Complete, Terminal
from hamner.data.chat_template import Message, render_prompt, turn_ends
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.errors import UserError
from hamner.model.generate import ContextError, answer
from hamner.model.sampling import Sampling
from tests.scripted import Script

GREEDY = Sampling(temperature=0)
END = 4


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer has one token a byte."""
    return load_tokenizer(vocab_size=261)


class Talk(Chat):
    """A talk is a chat without a terminal: `ask` gives what was shown."""

    def __init__(self, tokenizer, says: str, *, context: int = 1000, **config) -> None:
        self.script = Script(tokenizer, [*tokenizer.encode(says), END], context)
        self.shown = ""
        super().__init__(
            ChatConfig(sampling=GREEDY, **config), self.script, Terminal(input, self.show)
        )

    def show(self, piece: str) -> None:
        self.shown += piece

    def ask(self, text: str) -> str:
        self.shown = ""
        self.answer(text)
        return self.shown

    @property
    def messages(self) -> list[Message]:
        return [Message(**message) for message in self.record()["messages"]]


def test_the_model_sees_the_whole_conversation_in_the_template(tokenizer):
    talk = Talk(tokenizer, "Hey!", system="Be terse.")
    assert talk.ask("Hi") == "Hey!\n"
    assert talk.ask("Bye") == "Hey!\n"
    messages = [
        Message("system", "Be terse."),
        Message("user", "Hi"),
        Message("assistant", "Hey!"),
        Message("user", "Bye"),
        Message("assistant", "Hey!"),
    ]
    assert talk.messages == messages
    assert talk.script.prompts == [
        render_prompt(messages[:2], tokenizer),
        render_prompt(messages[:4], tokenizer),
    ]
    talk.clear("")
    talk.ask("Hi")
    assert talk.messages == messages[:3]


def test_every_answer_has_a_seed_of_its_own_and_the_flag_decides_them(tokenizer):
    seeds = []
    for seed in (5, 5, 6):
        talk = Talk(tokenizer, "Hey!", seed=seed)
        talk.ask("Hi")
        talk.ask("Hi")
        seeds.append(tuple(talk.script.seeds))
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 4


def test_an_answer_that_was_cut_says_so(tokenizer):
    assert Talk(tokenizer, "four").ask("Hi") == "four\n"
    talk = Talk(tokenizer, "four", max_new_tokens=3)
    assert talk.ask("Hi").startswith("fou\n(cut: no room for more")
    assert talk.turns[-1] == Message("assistant", "fou")


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end|>", "<|user|>", "<|system|>"])
def test_anything_that_is_not_the_assistants_ends_its_turn(tokenizer, name):
    script = Script(tokenizer, [*tokenizer.encode("Hi"), tokenizer.special_id(name), 99])
    completion = answer(script, [Message("user", "?")], GREEDY, max_new_tokens=9, seed=0)
    assert completion.run() == "Hi"
    assert tokenizer.special_id(name) in turn_ends(tokenizer)


def test_the_text_of_anyones_tag_ends_an_answer_where_tags_are_text(tokenizer):
    script = Script(tokenizer.with_text_tags(), tokenizer.encode("Hi\n<|user|>\nMore"))
    completion = answer(script, [Message("user", "?")], GREEDY, max_new_tokens=20, seed=0)
    assert (completion.run(), completion.finish_reason) == ("Hi", "stop")


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_answer_left_early_is_part_of_the_conversation(tokenizer, monkeypatch, error):
    talk = Talk(tokenizer, "A long answer")
    tokens = talk.script.tokens

    def stop(*args, **kwargs):
        yield from itertools.islice(tokens(*args, **kwargs), 2)
        raise error

    monkeypatch.setattr(talk.script, "tokens", stop)
    with contextlib.suppress(UserError):
        talk.ask("Hi")
    assert talk.turns == [Message("user", "Hi"), Message("assistant", "A ")]
    assert "cut" not in talk.shown


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tokenizer):
    """Of 6 tokens of system prompt, 21 a pair of turns and 13 to ask, two pairs fit the reserve."""
    talk = Talk(tokenizer, "1234567", context=84, system="Sys")
    for number in range(4):
        talk.ask(f"asking {number}")
        assert len(talk.script.prompts[-1]) + 84 // 4 <= 84
    seen = [talk.messages[0], *talk.messages[3:8]]
    assert talk.script.prompts[-1] == render_prompt(seen, tokenizer)
    assert talk.forgotten == 2
    # Nothing is lost for who asks for the conversation.
    assert len(talk.messages) == 9
    # What was forgotten stays so, even if there is room again.
    talk.system = ""
    talk.ask("x")
    assert talk.script.prompts[-1] == render_prompt(talk.messages[4:-1], tokenizer)
    # Nor does it come back with what is forgotten later.
    for _ in range(3):
        talk.ask("asking on")
    assert talk.forgotten > 8
    assert talk.script.prompts[-1] == render_prompt(talk.messages[talk.forgotten : -1], tokenizer)
    assert f"no longer sees the oldest {talk.forgotten} messages" in talk.shown
    talk.clear("")
    for _ in range(2):
        talk.ask("x")
    assert talk.script.prompts[-1] == render_prompt(talk.messages[:-1], tokenizer)


def test_turns_are_kept_as_long_as_the_longest_answer_has_room(tokenizer):
    """The system prompt and the opening of the answer take room too."""
    turns = [Message("user", "a" * 20), Message("assistant", "b"), Message("user", "c")]
    messages = [Message("system", "Sys"), *turns]
    size = len(render_prompt(messages, tokenizer)) + 7
    kept, fewer = (
        newest_messages(messages, Script(tokenizer, [], context), max_new_tokens=7)
        for context in (size, size - 1)
    )
    assert (kept, fewer) == (messages, [messages[0], messages[3]])


def test_a_question_too_long_for_the_context_changes_nothing(tokenizer):
    talk = Talk(tokenizer, "Hey!", context=40)
    talk.ask("Hi")
    before = list(talk.turns)
    with pytest.raises(ContextError, match="messages take 105 tokens.* context is 40"):
        talk.ask("x" * 100)
    assert (talk.turns, talk.forgotten) == (before, 0)
    assert len(talk.script.prompts) == 1
    with pytest.raises(ContextError, match="messages take 40 tokens.* context is 40"):
        talk.ask("x" * 35)
    # One that leaves less than the reserve is still answered, as far as there is room.
    assert "(cut: no room for more" in talk.ask("x" * 32)
    assert talk.turns[-1] == Message("assistant", "Hey")


def test_a_text_that_the_tokenizer_cannot_spell_is_said():
    vocab = {character: i for i, character in enumerate("0123456789")} | {"</s>": 10}
    digits = Tokenizer(tokenizers.Tokenizer(models.BPE(vocab, [])).to_str(), "digits")
    session = Complete(ChatConfig(), Script(digits, [], 100), Terminal(input, str))
    with pytest.raises(UserError, match="has no token for anything in this text"):
        session.answer("hello")
