"""The rows time the data pipeline on the CPU: tokens a second that reach the trainer.

    pytest bench/test_data_pipeline.py --benchmark-only

`extra_info.tokens_per_second` is the median. It must stay well above what the GPU consumes: about
20,000 tokens/s on an RTX 3090, 250,000 on an H100.
"""

import itertools
import json
from pathlib import Path

import pytest

from hamner.data.builtin import builtin_documents
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.prepare import prepare
from hamner.data.tokenizer import Tokenizer, load_tokenizer

BATCH_SIZE, SEQ_LEN = 24, 1024
BATCHES = {"shards": 400, "text": 40}
COPIES = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """The fixture gives the built-in corpus a dozen times, made distinct: some 25 MB, 6M tokens."""
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for copy in range(COPIES):
            for document in builtin_documents():
                file.write(json.dumps({"text": f"{copy}. {document}"}) + "\n")
    return path


@pytest.fixture(scope="module")
def shards(text, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    prepare([str(text)], folder, tokenizer, shard_tokens=2_000_000)
    return folder


@pytest.mark.parametrize("source", ["shards", "text"])
def test_loader(benchmark, request, tokenizer, source):
    path = request.getfixturevalue(source)
    spec = f"shards:{path}" if source == "shards" else str(path)
    config = DataConfig((spec,), SEQ_LEN, BATCH_SIZE, seed=0)
    loader = TrainLoader(config, tokenizer)
    next(loader)  # opening, checking and filling the queue are not throughput

    def read():
        for _ in itertools.islice(loader, BATCHES[source]):
            pass

    benchmark.pedantic(read, rounds=5, warmup_rounds=1)
    loader.close()
    tokens = BATCHES[source] * BATCH_SIZE * SEQ_LEN
    speed = round(tokens / benchmark.stats.stats.median)
    benchmark.extra_info.update(kind="data", source=source, tokens_per_second=speed)
