"""Services that get the metrics: what they are told of a run."""

import sys
from dataclasses import replace

import pytest

from hamner.config.options import OPTIONS
from hamner.train.reporters import Tracker


class Service:
    """A module with wandb's interface, which keeps what it is opened with."""

    def __init__(self) -> None:
        self.opened: list[dict] = []

    def init(self, **how) -> None:
        self.opened.append(how)


def open_tracker(monkeypatch, module, *folders) -> list[dict]:
    monkeypatch.setitem(sys.modules, module, service := Service())
    for folder in folders:
        folder.mkdir(exist_ok=True)
        Tracker(module, replace(OPTIONS["tiny"], run_dir=folder))
    return service.opened


def test_every_start_goes_on_with_one_run_of_wandb(monkeypatch, tmp_path):
    """It makes a new one of a name that it knows, so a run has an id."""
    a, b = tmp_path / "a", tmp_path / "b"
    first, again, other = open_tracker(monkeypatch, "wandb", a, a, b)
    assert first["id"] == again["id"] == (a / "wandb-id").read_text().strip()
    assert other["id"] != first["id"]
    assert [how["name"] for how in (first, again, other)] == ["a", "a", "b"]
    assert {how["resume"] for how in (first, again, other)} == {"allow"}


@pytest.mark.parametrize("kept", ["", "\n"])
def test_an_id_that_was_not_written_is_made_again(monkeypatch, tmp_path, kept):
    (tmp_path / "wandb-id").write_text(kept)
    (opened,) = open_tracker(monkeypatch, "wandb", tmp_path)
    assert opened["id"] == (tmp_path / "wandb-id").read_text().strip() != ""


def test_trackio_knows_a_run_by_its_name(monkeypatch, tmp_path):
    (opened,) = open_tracker(monkeypatch, "trackio", tmp_path)
    assert "id" not in opened
    assert list(tmp_path.iterdir()) == []
