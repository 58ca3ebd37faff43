"""The import of the earlier trainer's checkpoints is held against that trainer's arithmetic."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from hamner.checkpoint.__main__ import main
from hamner.checkpoint.import_pt import add_chat_tokens, import_checkpoint
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from hamner.errors import UserError
from hamner.train.loop import TrainingLoop
from tests.models import DENSE, MOE

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "num_experts": 1,
    "num_active_experts": 1,
    "expert_intermediate_size": 96,
    "max_seq_len": 64,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.01,
    "dropout": 0.0,
    "tie_word_embeddings": True,
    "gradient_checkpointing": True,
    "use_differential_attention": False,
    "architecture": "transformer",
}
EXPERTS = {"num_experts": 4, "num_active_experts": 2, "expert_intermediate_size": 48}


def earlier_weights(shape: dict) -> dict[str, torch.Tensor]:
    """The function makes a state dict as the earlier trainer saved it."""
    generator = torch.Generator().manual_seed(5)
    d, width = shape["hidden_size"], shape["expert_intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_kv_heads"]
    sizes = {"embed_tokens.weight": (shape["vocab_size"], d), "final_norm.weight": (d,)}
    for layer in range(shape["num_layers"]):
        names = {"attn_norm.weight": (d,), "mlp_norm.weight": (d,)}
        names |= {f"attention.{p}_proj.weight": (kv if p in "kv" else d, d) for p in "qkvo"}
        mlps = ["mlp.mlp"]
        if shape["num_experts"] > 1:
            mlps = [f"mlp.experts.{e}" for e in range(shape["num_experts"])]
            names["mlp.router.weight"] = (shape["num_experts"], d)
        for mlp in mlps:
            names |= {f"{mlp}.{p}_proj.weight": (width, d) for p in ("gate", "up")}
            names[f"{mlp}.down_proj.weight"] = (d, width)
        sizes |= {f"layers.{layer}.{name}": size for name, size in names.items()}
    weights = {
        name: torch.randn(size, generator=generator) * (0.2 if len(size) > 1 else 0.1)
        for name, size in sizes.items()
    }
    for name, weight in weights.items():
        if "norm" in name:
            weight += 1
    head = torch.randn(weights["embed_tokens.weight"].shape, generator=generator)
    tied = shape["tie_word_embeddings"]
    weights["lm_head.weight"] = weights["embed_tokens.weight"] if tied else head * 0.2
    return weights


def earlier_logits(shape: dict, w: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """The function is the earlier trainer's forward pass, written anew: (B, T) -> (B, T, V)."""
    heads, kv_heads = shape["num_attention_heads"], shape["num_kv_heads"]
    size, (rows, length) = shape["hidden_size"] // heads, inputs.shape
    frequencies = shape["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)

    def norm(x, name):
        return functional.rms_norm(x, x.shape[-1:], w[name], shape["rms_norm_eps"])

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def swiglu(x, name):
        gate, up = (x @ w[f"{name}.{p}_proj.weight"].T for p in ("gate", "up"))
        return (functional.silu(gate) * up) @ w[f"{name}.down_proj.weight"].T

    x = w["embed_tokens.weight"][inputs]
    for layer in (f"layers.{i}" for i in range(shape["num_layers"])):
        h = norm(x, f"{layer}.attn_norm.weight")
        q, k, v = (
            (h @ w[f"{layer}.attention.{p}_proj.weight"].T).view(rows, length, n, size)
            for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k, v = (x_.transpose(1, 2) for x_ in (q, k, v))
        k, v = (x_.repeat_interleave(heads // kv_heads, 1) for x_ in (rotate(k), v))
        scores = rotate(q) @ k.transpose(-1, -2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + out @ w[f"{layer}.attention.o_proj.weight"].T
        h = norm(x, f"{layer}.mlp_norm.weight")
        if shape["num_experts"] > 1:
            probabilities = (h @ w[f"{layer}.mlp.router.weight"].T).softmax(-1)
            top, chosen = probabilities.topk(shape["num_active_experts"], -1)
            share = torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, True))
            x = x + sum(
                share[..., e, None] * swiglu(h, f"{layer}.mlp.experts.{e}")
                for e in range(shape["num_experts"])
            )
        else:
            x = x + swiglu(h, f"{layer}.mlp.mlp")
    return norm(x, "final_norm.weight") @ w["lm_head.weight"].T


def write(path, shape: dict, weights=None, **content):
    weights = earlier_weights(shape) if weights is None else weights
    values = {
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "config": shape,
        "step": 99_000,
        "avg_loss": 3.41,
        "tokens_total": 2_450_000_000,
        "training_type": "pretrain",
    }
    torch.save(values | content, path)
    return path


def imported(tmp_path, shape, **kwargs):
    file = write(tmp_path / "latest.pt", shape, **kwargs)
    return import_checkpoint(file, tmp_path / "run", str(small_tokenizer(tmp_path)))


def small_tokenizer(tmp_path):
    path = tmp_path / "small.json"
    load_tokenizer(vocab_size=300).save(path)
    return path


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, EXPERTS], ids=["dense", "untied", "moe"]
)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_the_imported_model_computes_what_the_earlier_one_did(changes, prefix, tmp_path):
    shape = SHAPE | changes
    weights = earlier_weights(shape)
    result = imported(
        tmp_path, shape, weights={f"{prefix}{name}": w for name, w in weights.items()}
    )
    expected = MOE if "num_experts" in changes else DENSE
    tied = shape["tie_word_embeddings"]
    assert result.config.model == replace(expected, vocab_size=300, tie_word_embeddings=tied)
    saved = find_saved_model(tmp_path / "run")
    assert (saved.checkpoint.step, saved.is_chat) == (99_000, False)
    assert saved.checkpoint.state()["tokens"] == 2_450_000_000
    inputs = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(1))
    logits = saved.build(torch.device("cpu"))(inputs).logits
    reference = earlier_logits(shape, weights, inputs)
    assert reference.std() > 0.5
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-4)


def test_half_precision_is_read_as_it_is(tmp_path):
    weights = {name: weight.half() for name, weight in earlier_weights(SHAPE).items()}
    imported(tmp_path, SHAPE, weights=weights)
    saved = find_saved_model(tmp_path / "run").weights()
    assert torch.equal(saved["embed.weight"], weights["embed_tokens.weight"].float())


def test_training_does_not_go_on_from_it(tmp_path):
    """Its optimizer's state is not ours; to resume must say so."""
    imported(tmp_path, SHAPE)
    config = TrainConfig.read(tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match="imported without its optimizer's state"):
        TrainingLoop(replace(config, resume=True, device="cpu"))


def damaged(name):
    weights = earlier_weights(SHAPE)
    if name == "missing":
        del weights["layers.1.attention.k_proj.weight"]
    elif name == "shape":
        weights["layers.1.attention.k_proj.weight"] = torch.zeros(64, 64)
    else:
        weights["layers.2.attn_norm.weight"] = torch.ones(64)
    return weights


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"config": SHAPE | {"use_differential_attention": True}}, "differential attention"),
        ({"config": SHAPE | {"architecture": "mamba"}}, "only transformers"),
        ({"config": SHAPE | {"num_kv_heads": 3}}, "--num-kv-heads 3"),
        ({"config": {"hidden_size": 64}}, "its config has no expert_intermediate_size"),
        ({"config": None}, "needs the two dicts config and model_state_dict"),
        ({"weights": damaged("missing")}, "no layers.1.attention.k_proj.weight"),
        ({"weights": damaged("shape")}, r"k_proj.weight has shape \(64, 64\).* \(32, 64\)"),
        ({"weights": damaged("extra")}, "layers.2.attn_norm.weight, which has no place"),
    ],
)
def test_what_cannot_be_imported_is_named_and_nothing_written(content, named, tmp_path):
    with pytest.raises(UserError, match=named):
        imported(tmp_path, SHAPE, **content)
    assert not (tmp_path / "run").exists()


class Bomb:
    """The bomb is what an evil pickle does when it is opened."""

    def __reduce__(self):
        return os.mkdir, (Bomb.target,)


def test_nothing_is_unpickled(tmp_path):
    Bomb.target = str(tmp_path / "exploded")
    with pytest.raises(UserError, match="not a checkpoint of tensors and plain values"):
        imported(tmp_path, SHAPE, extra=Bomb())
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(UserError, match="noise.pt is not a checkpoint"):
        import_checkpoint(tmp_path / "noise.pt", tmp_path / "run", "builtin")


def foreign_tokenizer(tmp_path, reserved: int):
    """The function makes a tokenizer whose special tokens are none of ours but the end of text."""
    definition = load_tokenizer(vocab_size=300).definition
    names = {name: f"<reserved_{i}>" for i, name in enumerate(SPECIAL_TOKENS) if i}
    vocab = definition["model"]["vocab"]
    changed = definition | {
        "added_tokens": [
            token | {"content": names.get(token["content"], token["content"])}
            for token in definition["added_tokens"][: reserved + 1]
        ],
        "model": definition["model"]
        | {"vocab": {names.get(token, token): i for token, i in vocab.items()}},
    }
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(changed))
    return path


def test_reserved_tokens_become_those_of_conversations(tmp_path):
    tokenizer = load_tokenizer(str(foreign_tokenizer(tmp_path, 4)))
    renamed = add_chat_tokens(tokenizer)
    ids = [renamed.special_id(name) for name in SPECIAL_TOKENS[1:]]
    assert sorted(ids) == [1, 2, 3, 4]
    assert renamed.eot_id == tokenizer.eot_id
    text = "Plain text stays: <reserved_1> naïve 你好."
    assert renamed.encode(text) == tokenizer.encode(text)
    assert add_chat_tokens(load_tokenizer(str(foreign_tokenizer(tmp_path, 3)))) is None
    ours = load_tokenizer(vocab_size=300)
    assert add_chat_tokens(ours).fingerprint == ours.fingerprint


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path):
    file = write(tmp_path / "latest.pt", SHAPE)
    with pytest.raises(UserError, match="--tokenizer builtin has 49,152 entries"):
        import_checkpoint(file, tmp_path / "run", "builtin")


def test_command(tmp_path):
    file = write(tmp_path / "latest.pt", SHAPE)
    tokenizer = foreign_tokenizer(tmp_path, 3)
    args = [str(file), "--run-dir", "run", "--tokenizer", str(tokenizer)]
    command = [sys.executable, "-m", "hamner.checkpoint", "import", *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "parameters of step 99,000 (2,450,000,000 tokens) into run/" in result.stdout
    assert "not be fine-tuned to chat" in result.stdout
    with pytest.raises(UserError, match="--run-dir .*run exists already: name another folder"):
        main(
            ["import", str(file), "--run-dir", str(tmp_path / "run"), "--tokenizer", str(tokenizer)]
        )
