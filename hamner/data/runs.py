"""Very long runs of blanks or of one character are encoded in parts.

A pattern that many tokenizers have, blanks up to a line's end, goes back over all the blanks of a
run that ends elsewhere; beyond ten million steps the library panics.
"""

import itertools
import re
from collections.abc import Callable, Sequence

MAX_RUN = 2**20
_LONG_RUN = re.compile(rf"\s{{{MAX_RUN}}}|(.)\1{{{MAX_RUN - 1}}}")


def parts_of(text: str) -> list[str]:
    """The parts are the text itself, unless it has a run that is cut after every `MAX_RUN`."""
    if len(text) < MAX_RUN:
        return [text]
    cuts = [0, *(match.end() for match in _LONG_RUN.finditer(text)), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]


def encode_in_parts(
    encode: Callable[[list[str]], list[list[int]]], texts: Sequence[str]
) -> list[list[int]]:
    """The function encodes texts at once, those with long runs in parts."""
    parts = [parts_of(text) for text in texts]
    ids = iter(encode(list(itertools.chain(*parts))))
    return [list(itertools.chain(*itertools.islice(ids, len(of_text)))) for of_text in parts]
