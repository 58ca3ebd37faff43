"""Small files and a small tokenizer for the tests of the data pipeline."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import settings

from hamner.data.tokenizer import Tokenizer, load_tokenizer

# Examples are not timed: machines that run tests are shared.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The built-in tokenizer cut to its first 512 ids."""
    return load_tokenizer(vocab_size=512)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[object]], Path]:
    """Writes rows as JSON lines under the test's folder."""

    def write(name: str, rows: Iterable[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Writes columns as parquet under the test's folder."""

    def write(name: str, row_group_size: int = 10, **columns: list[object]) -> Path:
        path = tmp_path / name
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path, row_group_size=row_group_size, compression="zstd")
        return path

    return write
