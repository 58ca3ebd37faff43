"""The hub as it fails: `datasets` for real, against a server on this machine."""

import itertools
import json
import logging

import datasets
import fsspec
import huggingface_hub
import pytest
from huggingface_hub import hf_file_system

from hamner.data import background, hub, retry, stages
from hamner.data.hub import HubSource
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.retry import RetriedSource
from hamner.errors import UserError
from tests.data.hub_server import FAULTS, HubServer

FILES, PER_FILE = 3, 50
TEXTS = {f"file {i} document {j}" for i in range(FILES) for j in range(PER_FILE)}
SPEC = "hf:owner/name"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with three files, which the libraries take for the real one, and no patience."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for i in range(FILES):
        rows = [json.dumps({"text": f"file {i} document {j}"}) for j in range(PER_FILE)]
        (folder / f"train-{i}.jsonl").write_text("\n".join(rows) + "\n")
    server = HubServer(folder)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    # The libraries' own attempts last half a minute; how ours go on after them is what is tested.
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    backoff = hf_file_system.http_backoff
    monkeypatch.setattr(
        hf_file_system, "http_backoff", lambda *a, **k: backoff(*a, max_retries=0, **k)
    )
    monkeypatch.setattr(hub, "BLOCK_DOCUMENTS", 20)
    monkeypatch.setattr(hub, "STALL_SECONDS", 0.8)
    monkeypatch.setattr(background, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.001)
    yield server
    server.close()


def open_hub():
    return RetriedSource(HubSource("owner/name"), SPEC)


def texts(source):
    return [text for text, _ in source.documents(0, 0, None)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_loses_nothing_and_repeats_nothing(server, fault, caplog):
    source = open_hub()
    undisturbed = texts(source)
    assert set(undisturbed) == TEXTS and len(undisturbed) == len(TEXTS)
    caplog.clear()
    server.requests.clear()
    documents = source.documents(0, 0, None)
    disturbed = []
    for text, _ in documents:
        disturbed.append(text)
        if len(disturbed) == PER_FILE:  # the next file begins with two faults
            server.faults = [fault, fault]
    assert disturbed == undisturbed
    assert not server.faults
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    assert f"--data {SPEC}: " in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_source_that_stays_down_ends_in_one_sentence(server, fault):
    source = open_hub()
    server.is_down = fault
    with pytest.raises(UserError, match=f"--data {SPEC}: given up after 3 attempts") as caught:
        texts(source)
    assert "\n" not in str(caught.value)


@pytest.fixture
def loader_of(tokenizer, monkeypatch):
    monkeypatch.setattr("hamner.data.loader.PREFETCH", 1)
    loaders = []

    def make(*specs):
        loaders.append(TrainLoader(DataConfig(specs, 16, 2, 0, 0.0), tokenizer))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def personal(write_jsonl):
    return str(write_jsonl("personal.jsonl", [{"text": f"personal {i}"} for i in range(40)]))


def text_of(batches, tokenizer):
    return [tokenizer.decode(batch.inputs.reshape(-1).tolist()) for batch in batches]


def test_others_take_the_place_of_a_dead_source(server, loader_of, personal, tokenizer, caplog):
    specs = (f"{SPEC}=0.9", f"{personal}=0.1")
    loader = loader_of(*specs)
    before = text_of(itertools.islice(loader, 5), tokenizer)
    assert all("document" in text for text in before)
    assert not loader.progress()[SPEC]["lost"]
    server.is_down = "breaks off"
    after = text_of(itertools.islice(loader, 300), tokenizer)
    assert any("document" in text for text in after)  # the rest of what was here already
    assert not any("document" in text for text in after[-20:])
    assert all("personal" in text for text in after[-20:])
    assert loader.progress()[SPEC]["lost"] and not loader.progress()[personal]["lost"]
    assert "given up after 3 attempts" in caplog.text
    assert "TRAINING GOES ON WITHOUT IT" in caplog.text

    # A resumed run goes on without it, and reads what the other would have read.
    state = json.loads(json.dumps(loader.state_dict()))
    caplog.clear()
    server.is_down = None
    resumed = loader_of(*specs)
    resumed.load_state_dict(state)
    assert f"--data {SPEC}: was lost before" in caplog.text
    expected = text_of(itertools.islice(loader, 20), tokenizer)
    assert text_of(itertools.islice(resumed, 20), tokenizer) == expected
    assert resumed.state_dict() == loader.state_dict()


def test_a_dead_source_comes_back(server, loader_of, personal, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(stages, "LOST_TOKENS", 400)
    loader = loader_of(f"{SPEC}=0.9", f"{personal}=0.1")
    next(loader)
    server.is_down = "refuses"
    while not loader.progress()[SPEC]["lost"]:
        next(loader)
    requests = len(server.requests)
    list(itertools.islice(loader, 30))
    # Asked again now and then, with one attempt each.
    assert 1 <= len(server.requests) - requests <= 30 * 32 // 400 + 1
    assert loader.progress()[SPEC]["lost"]
    server.is_down = None
    list(itertools.islice(loader, 30))
    assert not loader.progress()[SPEC]["lost"]
    assert f"--data {SPEC}: is back" in caplog.text
    counts = [loader.progress()[spec]["tokens"] for spec in (SPEC, personal)]
    list(itertools.islice(loader, 60))
    gains = [
        loader.progress()[spec]["tokens"] - n
        for spec, n in zip((SPEC, personal), counts, strict=True)
    ]
    # Its share again, and no more than its share for the time it was away.
    assert 0.85 < gains[0] / sum(gains) < 0.95


def test_the_only_source_stops_with_a_state_that_goes_on(server, loader_of, tokenizer):
    whole = text_of(itertools.islice(loader_of(SPEC), 60), tokenizer)
    loader = loader_of(SPEC)
    read = text_of(itertools.islice(loader, 2), tokenizer)
    server.is_down = "garbage"
    with pytest.raises(UserError, match=f"--data {SPEC}: given up after"):
        for batch in loader:
            read += text_of([batch], tokenizer)
    server.is_down = None
    resumed = loader_of(SPEC)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    read += text_of(itertools.islice(resumed, 60 - len(read)), tokenizer)
    assert read == whole


def test_a_source_that_was_never_there_is_bad_input(server, loader_of, personal):
    server_down_after_opening = loader_of(f"{SPEC}=0.5", f"{personal}=0.5")
    server.is_down = "refuses"
    with pytest.raises(UserError, match=f"--data {SPEC}: given up after 3 attempts"):
        next(server_down_after_opening)


def test_what_others_open_is_left_alone(server):
    open_hub()
    assert fsspec.get_filesystem_class("hf") is huggingface_hub.HfFileSystem
