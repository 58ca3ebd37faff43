"""Two quick probes of a chat model: small sums and common facts.

They tell a model that learned to answer from one that did not; they are no benchmark. Answers are
generated greedily, so a model always gets the same score.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

SUMS: tuple[tuple[str, int], ...] = (
    ("What is 2 + 3?", 5),
    ("What is 4 + 4?", 8),
    ("What is 7 + 6?", 13),
    ("What is 9 + 8?", 17),
    ("What is 12 + 5?", 17),
    ("What is 20 + 15?", 35),
    ("What is 8 - 3?", 5),
    ("What is 15 - 6?", 9),
    ("What is 30 - 12?", 18),
    ("What is 3 times 6?", 18),
    ("What is 7 * 5?", 35),
    ("What is 9 * 9?", 81),
)
FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is the capital of France?", ("paris",)),
    ("What is the capital of Germany?", ("berlin",)),
    ("What is the largest ocean?", ("pacific",)),
    ("Which planet is known as the red planet?", ("mars",)),
    ("What is frozen water called?", ("ice",)),
    ("How many days are in a week?", ("seven", "7")),
    ("How many legs does a spider have?", ("eight", "8")),
    ("What colour is the sky on a clear day?", ("blue",)),
    ("Who wrote Romeo and Juliet?", ("shakespeare",)),
    ("What gas do plants take from the air?", ("carbon dioxide", "co2")),
    ("What is the opposite of hot?", ("cold",)),
    ("Which month comes after June?", ("july",)),
)


@dataclass(frozen=True)
class Probed:
    """One question of a probe."""

    question: str
    answer: str
    is_right: bool


@dataclass(frozen=True)
class ProbeResult:
    """Shares of right answers, and the answers."""

    arithmetic: float
    facts: float
    answers: list[Probed]


def probe(ask: Callable[[str], str]) -> ProbeResult:
    """Ask every question.

    Args:
        ask: gives the model's answer to a question.
    """
    sums = [_probed(question, ask(question), _is_number(right)) for question, right in SUMS]
    facts = [_probed(question, ask(question), _has_word(right)) for question, right in FACTS]
    return ProbeResult(_share(sums), _share(facts), sums + facts)


def _probed(question: str, answer: str, is_right: Callable[[str], bool]) -> Probed:
    return Probed(question, answer, is_right(answer))


def _is_number(right: int) -> Callable[[str], bool]:
    """The last number of the answer counts: before it may come the question's."""

    def judge(answer: str) -> bool:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
        return bool(numbers) and float(numbers[-1]) == right

    return judge


def _has_word(right: tuple[str, ...]) -> Callable[[str], bool]:
    def judge(answer: str) -> bool:
        return any(re.search(rf"\b{re.escape(word)}\b", answer.lower()) for word in right)

    return judge


def _share(answers: list[Probed]) -> float:
    return sum(answer.is_right for answer in answers) / len(answers)
