import functools
import itertools
import json
import threading
from unittest import mock

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from hamner.data import background, hub, retry, sources
from hamner.data.hub import HubSource, open_dataset
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.retry import RetriedSource
from hamner.errors import UserError

TEXTS = [f"file {i % 4} document {i}" for i in range(200)]


@pytest.fixture
def repository(tmp_path, write_jsonl):
    """A folder that stands for a repository of the hub: four files of a dataset."""
    for file in range(4):
        write_jsonl(f"train-{file}.jsonl", [{"text": text, "id": 1} for text in TEXTS[file::4]])
    return tmp_path


def open_local(repository):
    files = sorted(map(str, repository.glob("*.jsonl")))
    return lambda name, config, split: datasets.load_dataset(
        "json", data_files=files, split=split, streaming=True
    )


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    monkeypatch.setattr(hub, "BLOCK_DOCUMENTS", 15)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.001)


def hub_source(opener, location="owner/name", bad_rows=None):
    """The source reads what `opener` opens instead of the hub."""
    with mock.patch.object(hub, "open_dataset", opener):
        return HubSource(location, bad_rows)


class Faulty:
    """A dataset whose streams do something bad at some rows, until there are no faults left."""

    def __init__(self, dataset, faults):
        self._dataset = dataset
        self._faults = faults
        self.num_shards = dataset.num_shards

    def shard(self, num_shards, index):
        return FaultyStream(self._dataset.shard(num_shards=num_shards, index=index), self._faults)


class FaultyStream:
    def __init__(self, stream, faults):
        self._stream = stream
        self._faults = faults
        self.state_dict = stream.state_dict
        self.load_state_dict = stream.load_state_dict

    def __iter__(self):
        for number, row in enumerate(self._stream):
            if self._faults and number == self._faults[0][0]:
                self._faults.pop(0)[1]()
            yield row


def fails(error=None):
    def fault():
        raise error or ConnectionResetError("peer went away")

    return fault


def faulty(repository, *faults):
    faults = list(faults)
    opener = open_local(repository)
    source = hub_source(lambda *a: Faulty(opener(*a), faults))
    return RetriedSource(source, "hf:owner/name"), faults


def texts(source, seed=0, epoch=0):
    return [text for text, _ in source.documents(seed, epoch, None)]


def test_every_document_once_in_an_order_by_seed_and_epoch(repository):
    source = hub_source(open_local(repository))
    assert sorted(texts(source)) == sorted(TEXTS)
    assert texts(source) == texts(source)
    for other in (texts(source, seed=1), texts(source, epoch=1)):
        assert sorted(other) == sorted(TEXTS)
        assert [t[:6] for t in other[::50]] != [t[:6] for t in texts(source)[::50]]  # files
        assert other != texts(source)
    in_order = [t for t in TEXTS if t.startswith(texts(source)[0][:6])]
    assert texts(source)[:50] != in_order


def test_resumes_after_any_document(repository):
    whole = list(hub_source(open_local(repository)).documents(0, 0, None))
    for index in (0, 13, 14, 15, 49, 50, 123, 199):
        state = json.loads(json.dumps(whole[index][1]))
        resumed = hub_source(open_local(repository)).documents(0, 0, state)
        # The stream's own states may name the same place in several ways.
        assert [text for text, _ in resumed] == [text for text, _ in whole[index + 1 :]]


def test_resumes_in_the_middle_of_parquet_files(write_parquet, tmp_path):
    for i in range(3):
        write_parquet(f"{i}.parquet", row_group_size=7, text=TEXTS[i::3])
    files = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]

    def opener(name, config, split):
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=True)

    whole = list(hub_source(opener).documents(0, 0, None))
    assert sorted(text for text, _ in whole) == sorted(TEXTS)
    for index in (0, 14, 15, 20, 29, 30, 66, 67, 150, 199):
        state = json.loads(json.dumps(whole[index][1]))
        resumed = hub_source(opener).documents(0, 0, state)
        # The stream's own states may name the same place in several ways.
        assert [text for text, _ in resumed] == [text for text, _ in whole[index + 1 :]]


def test_a_lost_connection_neither_loses_nor_repeats_documents(repository):
    expected = texts(hub_source(open_local(repository)))
    source, faults = faulty(
        repository, (3, fails()), (0, fails()), (20, fails(OSError())), (7, fails(KeyError("x")))
    )
    assert texts(source) == expected
    assert not faults


def test_a_stalled_connection_is_left_behind(repository, monkeypatch):
    monkeypatch.setattr(hub, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(background, "LEAVE_SECONDS", 0.1)
    expected = texts(hub_source(open_local(repository)))
    never = threading.Event()
    source, faults = faulty(repository, (5, never.wait), (25, never.wait))
    assert texts(source) == expected
    assert not faults
    never.set()


def test_network_that_stays_down_ends_in_one_sentence(repository):
    source, _ = faulty(repository, *[(0, fails())] * 9)
    with pytest.raises(UserError, match="--data hf:owner/name: given up after 3 attempts .*peer"):
        texts(source)


def test_attempts_count_anew_after_progress(repository):
    expected = texts(hub_source(open_local(repository)))
    source, faults = faulty(repository, *[(16, fails())] * 2, *[(20, fails())] * 5)
    assert texts(source) == expected


@pytest.mark.parametrize("row", [{"body": "x"}, {"text": None}, 7])
def test_row_that_is_no_document_is_refused_at_once(repository, row):
    class Garbage(FaultyStream):
        def __iter__(self):
            yield row

    class GarbageDataset(Faulty):
        def shard(self, num_shards, index):
            return Garbage(self._dataset.shard(num_shards=num_shards, index=index), [])

    opener = open_local(repository)
    source = hub_source(lambda *a: GarbageDataset(opener(*a), []))
    with pytest.raises(UserError, match="--data hf:owner/name: a row "):
        texts(source)


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:small", ("owner/name", "small", "train")),
        ("owner/name:small:test", ("owner/name", "small", "test")),
    ],
)
def test_location_names_config_and_split(repository, location, asked):
    calls = []
    opener = open_local(repository)

    def spy(*arguments):
        calls.append(arguments)
        return opener("json", None, "train")

    assert hub_source(spy, location).identity() == {"name": location, "files": 4}
    assert calls == [asked]


def test_folder_opens_as_a_repository_does(repository):
    source = hub_source(lambda n, c, s: open_dataset(str(repository), c, s))
    assert sorted(texts(source)) == sorted(TEXTS)


def test_typo_in_split_or_config_lists_what_there_is(repository):
    with pytest.raises(UserError, match=r"split trian cannot be opened .*\['train'\]"):
        open_dataset(str(repository), None, "trian")
    with pytest.raises(UserError, match=r"config smal.* cannot be opened .*default"):
        open_dataset(str(repository), "smal", "train")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("Dataset 'owner/typo' doesn't exist"), "no such dataset"),
        (ConnectionError("Couldn't reach\nthe hub"), r"cannot be reached \(Couldn't reach the hub"),
    ],
)
def test_typo_in_name_or_no_network_is_one_sentence(monkeypatch, error, message):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, **k: fails(error)())
    with pytest.raises(UserError, match=f"--data hf:owner/typo: .*{message}") as caught:
        HubSource("owner/typo")
    assert "\n" not in str(caught.value)


def test_trains_from_a_stream_and_resumes(repository, tokenizer, monkeypatch):
    local = functools.partial(hub_source, open_local(repository))
    monkeypatch.setattr(sources, "HubSource", local)
    config = DataConfig(("hf:owner/name",), seq_len=16, batch_size=2, seed=0)
    loader = TrainLoader(config, tokenizer)
    list(itertools.islice(loader, 30))
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [batch.inputs.tolist() for batch in itertools.islice(loader, 200)]
    loader.close()
    resumed = TrainLoader(config, tokenizer)
    resumed.load_state_dict(state)
    assert [batch.inputs.tolist() for batch in itertools.islice(resumed, 200)] == expected
    resumed.close()
