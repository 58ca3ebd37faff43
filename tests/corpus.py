"""Small corpora made for the tests."""

import json
from pathlib import Path

import numpy as np


def write_predictable(path: Path, documents: int = 60, length: int = 400) -> Path:
    """Text in which each character leaves two successors, equally likely: ln 2 nats a character.

    Two characters ahead there are four: a model trained on targets shifted twice stays at ln 4.
    """
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(documents):
            state, text = int(generator.integers(16)), []
            for coin in generator.integers(2, size=length):
                text.append("abcdefghijklmnop"[state])
                state = (2 * state + int(coin)) % 16
            file.write(json.dumps({"text": "".join(text)}) + "\n")
    return path
