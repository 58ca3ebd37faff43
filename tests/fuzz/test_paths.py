"""A path in a file never leads out of the file's folder."""

import hashlib
import json

import numpy as np
import pytest
import torch

from hamner.checkpoint import format as checkpoint
from hamner.data.prepare import prepare
from hamner.data.shards import ShardSource
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError

TOKENIZER = load_tokenizer(vocab_size=300)


@pytest.fixture
def shards(tmp_path):
    """Prepared shards, and beside their folder a file like one of theirs: the secret."""
    (tmp_path / "text.txt").write_text("Some text to learn from.")
    prepare([str(tmp_path / "text.txt")], tmp_path / "shards", TOKENIZER, val_fraction=0.0)
    secret = (tmp_path / "shards" / "train-00000.tokens").read_bytes()
    (tmp_path / "secret.tokens").write_bytes(secret)
    return tmp_path / "shards"


def read(folder):
    return list(ShardSource(str(folder), TOKENIZER).tokens("train", 0, 0, None))


def point_to(folder, name: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["file"] = name
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("absolute", [False, True])
def test_shard_elsewhere_is_refused(shards, absolute):
    secret = shards.parent / "secret.tokens"
    point_to(shards, str(secret) if absolute else "../secret.tokens")
    with pytest.raises(UserError, match="index.json is damaged .* is not in the folder"):
        read(shards)


def test_link_to_a_shard_elsewhere_is_refused(shards):
    assert read(shards)
    (shards / "train-00000.tokens").unlink()
    (shards / "train-00000.tokens").symlink_to(shards.parent / "secret.tokens")
    with pytest.raises(UserError, match="index.json is damaged .* is not in the folder"):
        read(shards)


def test_folder_of_shards_may_be_a_link(shards):
    (shards.parent / "link").symlink_to(shards)
    assert len(read(shards.parent / "link")) == 1


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "secret.safetensors"])
def test_manifest_of_a_checkpoint_names_no_other_file(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    tensors = {"weight": torch.ones(2)}
    saved = checkpoint.save(
        tmp_path / "checkpoints", 1, model=tensors, optimizer=tensors, state={"step": 1}
    )
    path = saved.path / checkpoint.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    data = np.zeros(3).tobytes()
    (tmp_path / "secret.safetensors").write_bytes(data)
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="manifest"):
        saved.verify()
