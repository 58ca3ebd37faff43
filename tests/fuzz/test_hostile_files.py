"""Thousands of damaged and hostile files: each is read, or refused in one sentence.

Anything but `UserError` fails the test; a crash takes the whole process; a large allocation is a
MemoryError under the limit of `conftest`.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.options import for_option, total_tokens
from hamner.config.train import TrainConfig
from hamner.data.files import FileSource
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.prepare import prepare
from hamner.data.shards import ShardSource
from hamner.data.tokenizer import load_tokenizer
from hamner.data.validation import ValidationSet
from hamner.errors import UserError
from hamner.plan.analysis import make_plan
from hamner.plan.measured_efficiency import measured_efficiency
from hamner.plan.report_card import ReportCard
from hamner.plan.run_curve import read_run
from hamner.plot.run import draw_run
from tests.fuzz.mutations import damaged, damaged_json, replaced
from tests.plan.test_report_card import CARD

fuzz = settings(settings.get_profile("fuzz"))

TEXTS = [f"Document {i} says {'so ' * (i % 7)}ä." for i in range(30)]


def read_or_refuse(read: Callable[[], object]) -> bool:
    """Whether it could be read; a refusal is one line that names something."""
    try:
        read()
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error
        assert len(str(error)) < 1100
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all examples of a test: each overwrites what it reads."""
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(vocab_size=300)


@fuzz
@given(data=damaged_json(for_option("tiny").to_json()))
def test_config(folder, data):
    path = folder / "config.json"
    path.write_bytes(data)
    read_or_refuse(lambda: total_tokens(TrainConfig.read(path)))


@fuzz
@given(data=damaged_json(json.loads(json.dumps(asdict(CARD)))))
def test_report_card(folder, data):
    path = folder / "card.json"
    path.write_bytes(data)

    def read():
        gpu, reached = measured_efficiency(ReportCard.read(path))
        prediction = make_plan(for_option("tiny"), gpu, reached=reached).prediction
        assert prediction.interval.low >= 0

    read_or_refuse(read)


@pytest.fixture(scope="module")
def definition(tokenizer, folder) -> dict:
    tokenizer.save(folder / "valid-tokenizer.json")
    return json.loads((folder / "valid-tokenizer.json").read_text())


@fuzz
@given(choice=st.data())
def test_tokenizer(folder, definition, choice):
    path = folder / "tokenizer.json"
    path.write_bytes(choice.draw(damaged_json(definition)))

    def read():
        tokenizer = load_tokenizer(str(path))
        tokenizer.decode(tokenizer.encode("Some text, 12345, ünïcödé\n\n  and <|endoftext|>"))
        tokenizer.encode_batch(TEXTS)

    read_or_refuse(read)


@pytest.fixture(scope="module")
def shards(folder, tokenizer) -> dict[str, bytes]:
    """The files of a folder of shards, by name."""
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    prepare(
        [str(folder / "text.jsonl")],
        folder / "prepared",
        tokenizer,
        shard_tokens=200,
        val_fraction=0.2,
    )
    return {path.name: path.read_bytes() for path in sorted((folder / "prepared").iterdir())}


@fuzz
@given(choice=st.data())
def test_shards(folder, shards, tokenizer, choice):
    target = folder / "shards"
    target.mkdir(exist_ok=True)
    name = choice.draw(st.sampled_from(sorted(shards)))
    for other, data in shards.items():
        (target / other).write_bytes(data)
    index = json.loads(shards["index.json"])
    strategy = damaged_json(index) if name == "index.json" else damaged(shards[name])
    (target / name).write_bytes(choice.draw(strategy))

    def read():
        source = ShardSource(str(target), tokenizer)
        source.identity()
        for split in ("train", "validation"):
            for ids, _ in source.tokens(split, 0, 0, None):
                assert len(ids) and ids.max() < tokenizer.vocab_size

    read_or_refuse(read)


@fuzz
@given(choice=st.data())
def test_interrupted_preparation(folder, shards, tokenizer, choice):
    """`progress.json`, from which a preparation goes on."""
    target = folder / "unfinished"
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        path.unlink()
    for name, data in shards.items():
        (target / name).write_bytes(data)
    index = json.loads((target / "index.json").read_text())
    (target / "index.json").unlink()
    half = [shard for shard in index["shards"] if shard["file"].endswith("00000.tokens")]
    state = {"file": 0, "block": 0, "row": 15}
    progress = index | {"source": 0, "state": state, "pairs": 1, "shards": half}
    (target / "progress.json").write_bytes(choice.draw(damaged_json(progress)))
    text = [str(folder / "text.jsonl")]
    read_or_refuse(lambda: prepare(text, target, tokenizer, shard_tokens=200, val_fraction=0.2))


TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(5)}


@pytest.fixture(scope="module")
def saved(folder) -> dict[str, bytes]:
    """The files of a checkpoint, by name."""
    (folder / "checkpoints").mkdir()
    moments = {f"{m}.{n}": t.clone() for m in ("exp_avg", "exp_avg_sq") for n, t in TENSORS.items()}
    state = {"step": 3, "rng": checkpoint.rng_state()}
    found = checkpoint.save(
        folder / "checkpoints", 3, model=TENSORS, optimizer=moments, state=state
    )
    return {path.name: path.read_bytes() for path in sorted(found.path.iterdir())}


def load_checkpoint(path: Path) -> None:
    found = checkpoint.Checkpoint(path, 3)
    for load in (
        lambda: found.load_model({name: t.clone() for name, t in TENSORS.items()}),
        lambda: found.load_optimizer(*({n: t.clone() for n, t in TENSORS.items()},) * 3),
        lambda: checkpoint.set_rng_state(found.state().get("rng", {})),
    ):
        load()


@fuzz
@given(choice=st.data())
def test_checkpoint(folder, saved, choice):
    target = folder / "step_00000003"
    target.mkdir(exist_ok=True)
    name = choice.draw(st.sampled_from(sorted(saved)))
    for other, data in saved.items():
        (target / other).write_bytes(data)
    is_json = name.endswith(".json")
    strategy = damaged_json(json.loads(saved[name])) if is_json else damaged(saved[name])
    data = choice.draw(strategy)
    (target / name).write_bytes(data)
    is_whole = read_or_refuse(checkpoint.Checkpoint(target, 3).verify)
    if name != checkpoint.MANIFEST_FILE:
        assert is_whole == (data == saved[name])
    # And as if the sums had been made to agree.
    before = torch.get_rng_state()
    read_or_refuse(lambda: load_checkpoint(target))
    torch.set_rng_state(before)


@pytest.fixture(scope="module")
def position(folder, tokenizer) -> dict:
    """The loader's part of `state.json`."""
    loader = TrainLoader(data_config(folder), tokenizer)
    for _ in range(7):
        next(loader)
    loader.close()
    return json.loads(json.dumps(loader.state_dict()))


def data_config(folder: Path) -> DataConfig:
    for name in "ab":
        rows = "".join(json.dumps(f"{name} {text}") + "\n" for text in TEXTS)
        (folder / f"{name}.jsonl").write_text(rows)
    specs = (f"{folder}/a.jsonl=0.5", f"{folder}/b.jsonl=0.5")
    return DataConfig(specs, 16, 2, 0, 0.1)


@fuzz
@given(choice=st.data())
def test_data_position(folder, position, tokenizer, choice):
    state = json.loads(json.dumps(choice.draw(replaced(position))))
    loader = TrainLoader(data_config(folder), tokenizer)

    def read():
        loader.load_state_dict(state)
        loader.progress()
        for _ in range(3):
            next(loader)

    try:
        read_or_refuse(read)
    finally:
        loader.close()


@fuzz
@given(choice=st.data())
def test_validation_rows(folder, tokenizer, choice):
    """A damaged file does not count: the rows are gathered again, the very same."""
    loader = TrainLoader(data_config(folder), tokenizer)
    path = folder / "validation.safetensors"
    path.unlink(missing_ok=True)
    fresh = ValidationSet(path, loader, 200)
    fresh.keep()
    path.write_bytes(choice.draw(damaged(path.read_bytes())))
    again = ValidationSet(path, loader, 200)
    for name, rows in asdict(fresh.rows).items():
        assert torch.equal(getattr(again.rows, name), rows)


RECORDS = [
    {"step": i, "tokens": 512 * i, "loss": 9 / i, "val_loss": 3.0, "val_step": 5, "lr": 1e-3}
    | {"grad_norm": 1.0, "tokens_per_second": 9.0, "peak_vram_gib": 1.0, "seconds": 1.0 * i}
    for i in range(1, 20)
]
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
CSV = (
    "step,loss,tokens_total\n" + "".join(f"{i},{9 / i},{512 * i}\n" for i in range(1, 20))
).encode()


@fuzz
@given(choice=st.data())
def test_metrics_to_plan_by(folder, choice):
    is_csv = choice.draw(st.booleans())
    path = folder / ("metrics.csv" if is_csv else "metrics.jsonl")
    if is_csv or choice.draw(st.booleans()):
        path.write_bytes(choice.draw(damaged(CSV if is_csv else JSON_LINES)))
    else:
        records = choice.draw(replaced(RECORDS))
        lines = records if isinstance(records, list) else [records]
        path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    read_or_refuse(lambda: read_run(path))


@fuzz
@given(choice=st.data())
def test_metrics_of_a_resumed_run(folder, choice):
    run = RunFolder(folder / "run")
    run.plots.mkdir(parents=True, exist_ok=True)
    if choice.draw(st.booleans()):
        run.metrics.write_bytes(choice.draw(damaged(JSON_LINES)))
    else:
        records = choice.draw(replaced(RECORDS))
        lines = records if isinstance(records, list) else [records]
        run.metrics.write_text("".join(json.dumps(record) + "\n" for record in lines))
    run.rewind(10)
    for line in run.metrics.read_text().splitlines() if run.metrics.exists() else ():
        assert json.loads(line)["step"] <= 10


@pytest.fixture(scope="module")
def data_files(folder) -> dict[str, bytes]:
    """One file of each format that is read, by name."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    text = "\n<|endoftext|>\n".join(TEXTS).encode()
    table = pyarrow.table({"text": TEXTS, "id": list(range(30))})
    pyarrow.parquet.write_table(table, folder / "p.parquet", row_group_size=10, compression="zstd")
    return {
        "a.jsonl": lines,
        "a.txt": text,
        "a.parquet": (folder / "p.parquet").read_bytes(),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.txt.zst": pyarrow.compress(text, codec="zstd", asbytes=True),
    }


@settings(fuzz, max_examples=1000)
@given(choice=st.data())
def test_data(folder, data_files, choice):
    name = choice.draw(st.sampled_from(sorted(data_files)))
    path = folder / name
    path.write_bytes(choice.draw(damaged(data_files[name])))
    read_or_refuse(lambda: list(FileSource(str(path)).documents(0, 0, None)))


def test_plots_of_a_strange_file(folder):
    run = RunFolder(folder / "strange")
    run.plots.mkdir(parents=True)
    strange = [{"step": 1, "tokens": "many"}, {"step": 2, "tokens": 5, "loss": "low"}]
    strange += [{"step": 3, "tokens": [1], "loss": None}, {"step": 4, "tokens": 10**400, "loss": 1}]
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in strange + RECORDS))
    assert draw_run(run)


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.jsonl.gz"])
def test_gigabytes_of_nothing(tmp_path, name):
    path = sparse(tmp_path / name, 8 * 2**30)
    assert not read_or_refuse(lambda: next(FileSource(str(path)).documents(0, 0, None)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_line_that_unpacks_to_a_gigabyte(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(300):
                file.write(b" " * 2**20)
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            for _ in range(300):
                file.write(b" " * 2**20)
    assert not read_or_refuse(lambda: list(FileSource(str(path)).documents(0, 0, None)))
