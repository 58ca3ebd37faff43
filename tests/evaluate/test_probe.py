"""The probes' judgement."""

import pytest

from hamner.evaluate.probe import FACTS, SUMS, probe


def asked(answers: dict[str, str]):
    return probe(lambda question: answers.get(question, ""))


def test_all_right_and_all_wrong():
    right = {question: f"It is {number}." for question, number in SUMS}
    right |= {question: f"That is {words[0].title()}!" for question, words in FACTS}
    result = asked(right)
    assert (result.arithmetic, result.facts) == (1.0, 1.0)
    assert len(result.answers) == len(SUMS) + len(FACTS)
    assert all(answer.is_right for answer in result.answers)
    silent = asked({})
    assert (silent.arithmetic, silent.facts) == (0.0, 0.0)


def test_sums_are_right():
    for question, number in SUMS:
        expression = question.removeprefix("What is ").removesuffix("?").replace("times", "*")
        left, operator, right = expression.split()
        operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        assert operations[operator](int(left), int(right)) == number, question


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("2 + 3 = 5.", True),
        ("5", True),
        ("5.0", True),
        ("2 + 3", False),
        ("15", False),
        ("-5", False),
        ("five", False),
        ("5 or 6", False),
    ],
)
def test_the_last_number_counts(answer, is_right):
    result = asked({"What is 2 + 3?": answer})
    assert result.answers[0].is_right == is_right


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("ICE", True), ("It is ice.", True), ("It is nice.", False), ("Iced water", False)],
)
def test_a_fact_is_a_whole_word(answer, is_right):
    question = "What is frozen water called?"
    (judged,) = [a for a in asked({question: answer}).answers if a.question == question]
    assert judged.is_right == is_right
