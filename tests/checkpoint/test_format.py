"""Checkpoints are whole or absent, and verified; nothing is unpickled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.format import CheckpointError


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "b.weight": torch.randn(7, generator=generator),
    }


def moments(names, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in names.items()}


def save(folder, step=3, **state):
    model = tensors()
    optimizer = {f"exp_avg.{n}": t for n, t in moments(model, 1).items()}
    optimizer |= {f"exp_avg_sq.{n}": t for n, t in moments(model, 2).items()}
    optimizer["master.a.weight"] = model["a.weight"].float() + 1e-4
    return checkpoint.save(
        folder, step, model=model, optimizer=optimizer, state={"step": step, **state}
    )


def test_round_trip(tmp_path):
    left_by_a_kill = tmp_path / ".saving_00000003"
    left_by_a_kill.mkdir()
    (left_by_a_kill / "model.safetensors.parts").write_bytes(b"half")
    saved = save(tmp_path)
    saved.verify()
    assert saved.path.name == "step_00000003"
    assert {p.name for p in saved.path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    assert saved.state() == {"step": 3}
    assert len({path.stat().st_mode for path in saved.path.iterdir()}) == 1
    model = tensors()
    loaded = {name: torch.zeros_like(t) for name, t in model.items()}
    saved.load_model(loaded)
    for name, tensor in model.items():
        assert torch.equal(loaded[name], tensor)

    masters = {name: t.float() for name, t in loaded.items()}
    exp_avg, exp_avg_sq = moments(model, 9), moments(model, 9)
    saved.load_optimizer(masters, exp_avg, exp_avg_sq)
    assert torch.equal(masters["a.weight"], model["a.weight"].float() + 1e-4)
    assert torch.equal(masters["b.weight"], model["b.weight"])
    assert torch.equal(exp_avg["a.weight"], moments(model, 1)["a.weight"])
    assert torch.equal(exp_avg_sq["b.weight"], moments(model, 2)["b.weight"])


def test_retention_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    (tmp_path / ".saving_00000099").mkdir()
    checkpoint.retain(tmp_path, 2)
    assert [c.step for c in checkpoint.find(tmp_path)] == [3, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]
    checkpoint.retain(tmp_path, 0)
    assert [c.step for c in checkpoint.find(tmp_path)] == [3, 10]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """A process that is killed while it removes one leaves no part of it under its name."""
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    checkpoint.retain(tmp_path, 1)
    save(tmp_path, 2)
    assert [c.step for c in checkpoint.find(tmp_path)] == [2]
    names = {path.name for path in tmp_path.glob(".*")}
    assert names == {".saving_removing_step_00000001", ".replaced_step_00000002"}


def test_retention_keeps_one_of_every_span(tmp_path):
    """With keep_every 10 a checkpoint of each ten steps stays, the first, even if it came late."""
    for step in (5, 10, 15, 21, 25, 30, 35, 40, 45):
        save(tmp_path, step)
        checkpoint.retain(tmp_path, 2, 10)
    assert [c.step for c in checkpoint.find(tmp_path)] == [10, 21, 30, 40, 45]


def damage(saved: checkpoint.Checkpoint, how: str) -> None:
    weights = saved.path / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif how == "flipped":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "foreign":
        for path in saved.path.iterdir():
            path.unlink()
        torch.save(tensors(), saved.path / "pytorch_model.bin")
    elif how == "another format":
        manifest = json.loads((saved.path / "manifest.json").read_text())
        (saved.path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize("how", ["truncated", "flipped", "foreign", "another format"])
def test_newest_whole_passes_over_damage_and_names_it(tmp_path, how):
    whole = save(tmp_path, 3)
    for step in (6, 9):
        damage(save(tmp_path, step), how)
    found, errors = checkpoint.newest_whole(tmp_path)
    assert found == whole
    assert ["step_00000009" in str(errors[0]), "step_00000006" in str(errors[1])] == [True, True]
    checkpoint.set_aside(tmp_path, found.step)
    assert checkpoint.find(tmp_path) == [whole]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("damaged_step_00000006", "damaged_step_00000009", "step_00000003")
    ]
    assert checkpoint.newest_whole(tmp_path) == (whole, [])


def test_a_disk_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    saved = save(tmp_path)

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "_describe", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\)"):
        saved.verify()


def test_the_best_outlives_retention(tmp_path):
    assert checkpoint.best(tmp_path) is None
    for step, best_step in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(tmp_path, step, best_step=best_step)
        checkpoint.retain(tmp_path, 1)
        assert checkpoint.best(tmp_path).step == best_step
    assert [c.step for c in checkpoint.find(tmp_path)] == [2, 4]
    # The best of steps 6 and 8 could not be saved.
    for step, best_step in ((7, 6), (9, 8)):
        save(tmp_path, step, best_step=best_step)
        checkpoint.retain(tmp_path, 1)
        assert checkpoint.best(tmp_path).step == 2
    save(tmp_path, 10, best_step=None)
    assert checkpoint.best(tmp_path) is None


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path)
    save(tmp_path).verify()
    assert [c.step for c in checkpoint.find(tmp_path)] == [3]


@pytest.mark.parametrize("killed", [True, False])
def test_a_step_that_is_saved_again_is_never_away(killed, tmp_path, monkeypatch):
    """Neither where the new one does not get its name, nor where a kill comes before that."""
    old = save(tmp_path).path.joinpath("manifest.json").read_bytes()
    rename = Path.rename

    def fail(path, target):
        if path.name.startswith(".saving_"):
            raise KeyboardInterrupt if killed else OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt if killed else OSError):
        save(tmp_path, other=1)
    monkeypatch.undo()
    assert len(checkpoint.find(tmp_path)) == (not killed)
    checkpoint.take_back(tmp_path)
    found, errors = checkpoint.newest_whole(tmp_path)
    assert not errors
    assert (found.path / "manifest.json").read_bytes() == old
    save(tmp_path, other=1)
    checkpoint.retain(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_failed_save_leaves_nothing_named_step(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_unfinished_folder_is_not_found(tmp_path):
    (tmp_path / ".saving_00000005").mkdir()
    (tmp_path / "step_5").mkdir()
    assert checkpoint.find(tmp_path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damage_is_named(tmp_path, name, damage):
    saved = save(tmp_path)
    path = saved.path / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        saved.verify()
    assert str(path) in str(raised.value)


def test_damaged_manifest_is_named(tmp_path):
    saved = save(tmp_path)
    manifest = saved.path / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    del files["optimizer.safetensors"]
    without_one = json.dumps({"format": 1, "files": files})
    for text in ("", "[]", "{}", json.dumps({"files": {"model.safetensors": 3}}), without_one):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            saved.verify()


def test_foreign_model_is_refused(tmp_path):
    saved = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"c\.weight"):
        saved.load_model({**tensors(), "c.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"a\.weight has shape \(5, 3\)"):
        saved.load_model({**tensors(), "a.weight": torch.zeros(3, 5)})


def test_pickle_is_not_read(tmp_path):
    saved = save(tmp_path)
    torch.save(tensors(), saved.path / "model.safetensors")
    with pytest.raises(CheckpointError, match="safetensors"):
        saved.load_model(tensors())


def test_rng_state_round_trips():
    torch.manual_seed(7)
    state = json.loads(json.dumps(checkpoint.rng_state()))
    expected = torch.rand(3)
    checkpoint.set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)


def test_names_are_checked_for_moments_too(tmp_path):
    saved = save(tmp_path)
    save_file({"exp_avg.a.weight": torch.zeros(5, 3)}, saved.path / "optimizer.safetensors")
    model = tensors()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        saved.load_optimizer(model, moments(model, 1), moments(model, 2))
