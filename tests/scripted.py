"""The module has a generator whose words are written beforehand."""

from collections.abc import Iterator

from hamner.data.tokenizer import Tokenizer


class Script:
    """The script stands in for a `Generator` of the model: it says the same ids to every prompt.

    Args:
        tokenizer: of the ids.
        ids: what it says.
        context: as of the real one.

    Attributes:
        prompts: what it was asked.
        seeds: with which.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int], context: int = 1000) -> None:
        self.tokenizer, self.ids, self.context = tokenizer, ids, context
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []

    def tokens(self, prompt, sampling, *, seed, unpenalized) -> Iterator[int]:
        self.prompts.append(list(prompt))
        self.seeds.append(seed)
        self.sampling = sampling
        yield from self.ids[: self.context - len(prompt)]
