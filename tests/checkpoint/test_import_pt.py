"""The import of the earlier trainer's checkpoints is held against that trainer's arithmetic."""

import json
import math
import os
import re
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional

from hamner.checkpoint.__main__ import main
from hamner.checkpoint.import_pt import describe, import_checkpoint
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.sft import SftConfig
from hamner.config.train import TrainConfig
from hamner.data.builtin import builtin_documents
from hamner.data.chat_template import JINJA_TEMPLATE, Message, jinja_template, render_prompt
from hamner.data.chat_tokens import add_chat_tokens
from hamner.data.conversations.examples import load_examples
from hamner.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from hamner.errors import UserError
from hamner.export.hf import write_hugging_face
from hamner.model.generate import answer
from hamner.model.sampling import Sampling
from hamner.progress import Task
from hamner.train.loop import TrainingLoop
from tests import forked
from tests.models import DENSE, MOE
from tests.scripted import Script

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


def write(path, shape: dict, weights=None, *, is_legacy=False, **content):
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
    torch.save(values | content, path, _use_new_zipfile_serialization=not is_legacy)
    return path


def imported(tmp_path, shape, *, tokenizer=None, **kwargs):
    file = write(tmp_path / "latest.pt", shape, **kwargs)
    tokenizer = tokenizer or small_tokenizer(tmp_path)
    return import_checkpoint(file, tmp_path / "run", str(tokenizer))


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


@pytest.mark.parametrize("changes", [{}, {"architecture": "emotional", "emotional_layers": 6}])
def test_the_older_file_format_and_the_model_s_other_name_are_read(changes, tmp_path):
    weights = earlier_weights(SHAPE)
    imported(tmp_path, SHAPE | changes, weights=weights, is_legacy=True)
    saved = find_saved_model(tmp_path / "run").weights()
    assert torch.equal(saved["embed.weight"], weights["embed_tokens.weight"])


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
    elif name == "not finite":
        weights["layers.1.attention.k_proj.weight"][3, 5:7] = torch.nan
    elif name == "integers":
        weights["layers.1.attention.k_proj.weight"] = torch.zeros(32, 64, dtype=torch.int8)
    elif name == "no tensor":
        weights["layers.1.attention.k_proj.weight"] = [0.0]
    elif name == "another head":
        weights["lm_head.weight"] = weights["lm_head.weight"] + 1
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
        ({"weights": damaged("not finite")}, "k_proj.weight has 2 values that are not finite"),
        ({"weights": damaged("integers")}, "k_proj.weight has the type torch.int8"),
        ({"weights": damaged("no tensor")}, "k_proj.weight is not a tensor"),
        ({"weights": damaged("another head")}, "lm_head.weight is not its embedding"),
        ({"weights": {1: 2}}, "no embed_tokens.weight"),
        ({"step": "99k"}, "its step is '99k', not a count"),
        ({"step": -1}, "its step is -1, not a count"),
        ({"tokens_total": 2.5}, "its tokens_total is 2.5, not a count"),
        ({"training_type": None}, "its training_type is None"),
        ({"config": SHAPE | {"num_experts": "4"}}, "field num_experts has an unfit value '4'"),
        ({"config": SHAPE | {"num_layers": 2.5}}, "field num_layers has an unfit value 2.5"),
        ({"config": SHAPE | {"vocab_size": None}}, "field vocab_size has an unfit value None"),
        ({"config": SHAPE | {"rope_theta": math.inf}}, "unfit value inf for rope_theta"),
        ({"config": SHAPE | {"rms_norm_eps": torch.ones(2)}}, "unfit value tensor"),
        ({"config": SHAPE | {"hidden_size": 10**400}}, "has shape"),
        ({"config": SHAPE | {"rope_theta": 10**400}}, "field rope_theta has an unfit value 1000"),
        ({"config": SHAPE | {"architecture": ["transformer"]}}, "unfit value .* for architecture"),
    ],
)
def test_what_cannot_be_imported_is_named_and_nothing_written(content, named, tmp_path):
    with pytest.raises(UserError, match=named) as caught:
        imported(tmp_path, SHAPE, **content)
    assert str(caught.value).count(".pt") == 1
    assert not (tmp_path / "run").exists()


class Bomb:
    """The bomb is what an evil pickle does when it is opened."""

    def __reduce__(self):
        return os.mkdir, (Bomb.target,)


def test_nothing_is_unpickled(tmp_path):
    Bomb.target = str(tmp_path / "exploded")
    with pytest.raises(UserError, match=r"holds \w+\.mkdir beside tensors and plain values"):
        imported(tmp_path, SHAPE, extra=Bomb())
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(UserError, match="noise.pt is not a checkpoint"):
        import_checkpoint(tmp_path / "noise.pt", tmp_path / "run", "builtin")


def test_a_damaged_file_is_refused(tmp_path):
    weights = earlier_weights(SHAPE)
    file = write(tmp_path / "latest.pt", SHAPE, weights)
    whole = file.read_bytes()
    values = weights["layers.0.attention.q_proj.weight"].numpy().tobytes()
    at = whole.index(values) + 4321
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    tokenizer = str(small_tokenizer(tmp_path))
    with pytest.raises(UserError, match=r"latest.pt is damaged: its part \S+/data/\d+ does not"):
        import_checkpoint(file, tmp_path / "run", tokenizer)
    for is_legacy, named in (
        (True, "is not a checkpoint .*, or is damaged"),
        (False, "is damaged: its end is missing; copy it again"),
    ):
        write(file, SHAPE, weights, is_legacy=is_legacy)
        file.write_bytes(file.read_bytes()[:-2_000])
        with pytest.raises(UserError, match=f"latest.pt {named}"):
            import_checkpoint(file, tmp_path / "run", tokenizer)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="latest.pt is damaged: its end is missing"):
        import_checkpoint(file, tmp_path / "run", tokenizer)
    assert not (tmp_path / "run").exists()


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        file = write(tmp_path / "latest.pt", SHAPE)
    finally:
        torch.serialization.set_crc32_options(True)
    import_checkpoint(file, tmp_path / "run", str(small_tokenizer(tmp_path)))


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


TALK = [Message("system", "Be terse."), Message("user", " Hi "), Message("assistant", "Hey!")]


@pytest.mark.parametrize("training_type", ["sft", "dpo"])
def test_a_chat_model_keeps_its_tags_as_text(training_type, tmp_path):
    foreign = foreign_tokenizer(tmp_path, 4)
    imported(tmp_path, SHAPE, training_type=training_type, tokenizer=foreign)
    saved = find_saved_model(tmp_path / "run")
    tokenizer, theirs = saved.tokenizer, load_tokenizer(str(foreign))
    assert saved.is_chat
    assert tokenizer.fingerprint == theirs.fingerprint
    assert f"a chat model (training_type {training_type}) that has the tags" in describe(saved)
    spelled = "<|system|>\nBe terse.\n<|user|>\nHi\n<|assistant|>\n"
    prompt = render_prompt(TALK[:2], tokenizer)
    assert prompt == theirs.encode(spelled)
    # The model goes on to the next turn, which it has read in text.
    script = Script(tokenizer, theirs.encode("Hey!\n<|user|>\nAnd"))
    text = answer(script, TALK[:2], Sampling(), max_new_tokens=99, seed=0).run()
    assert (text, script.prompts) == ("Hey!", [prompt])
    script = Script(tokenizer, [*theirs.encode("Hey!"), tokenizer.eot_id, 99])
    assert answer(script, TALK[:2], Sampling(), max_new_tokens=99, seed=0).run() == "Hey!"


def test_a_chat_model_is_fine_tuned_and_exported_as_it_was_trained(tmp_path):
    imported(tmp_path, SHAPE, training_type="sft", tokenizer=foreign_tokenizer(tmp_path, 4))
    config = SftConfig.for_checkpoint(tmp_path / "run").training()
    assert config.text_tags
    tokenizer = load_tokenizer(config.tokenizer, text_tags=config.text_tags)
    rows = [asdict(message) for message in [*TALK, Message("user", "Bye")]]
    data = tmp_path / "talk.jsonl"
    data.write_text(json.dumps({"messages": rows}))
    (source,) = load_examples(
        replace(config, data=(str(data),), seq_len=64, val_fraction=0), tokenizer
    )
    (example,) = source.train
    learned = example.ids[example.learned].tolist()
    assert tokenizer.decode(example.ids.tolist()) == (
        "<|system|>\nBe terse.\n<|user|>\nHi\n<|assistant|>\nHey!\n<|endoftext|>"
    )
    assert tokenizer.decode(learned) == "Hey!\n<|endoftext|>"
    write_hugging_face(tmp_path / "hf", find_saved_model(tmp_path / "run"))
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == jinja_template(tokenizer) != JINJA_TEMPLATE
    model = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert model["eos_token_id"] == tokenizer.eot_id


def test_a_base_model_that_has_read_dialogues_keeps_their_tags_as_text(tmp_path):
    foreign = foreign_tokenizer(tmp_path, 4)
    saved = imported(tmp_path, SHAPE, training_type="chat_pretrain", tokenizer=foreign)
    assert (saved.is_chat, saved.config.text_tags) == (False, True)
    assert "a base model (training_type chat_pretrain) that has read" in describe(saved)


@pytest.mark.parametrize(
    ("training_type", "is_chat"), [("pretrain_v4_anneal", False), ("sft", True)]
)
def test_tags_that_are_tokens_stay_tokens(training_type, is_chat, tmp_path):
    saved = imported(tmp_path, SHAPE, training_type=training_type)
    assert (saved.is_chat, saved.config.text_tags) == (is_chat, False)
    assert saved.tokenizer.fingerprint == load_tokenizer(vocab_size=300).fingerprint
    assert "as tokens of their own" in describe(saved)


def unigram_weights(tokenizer) -> dict[str, torch.Tensor]:
    """The function makes a model that knows how frequent each token is in built-in English."""
    ids = torch.cat([torch.tensor(tokenizer.encode(text)) for text in builtin_documents()[:300]])
    frequency = torch.bincount(ids, minlength=300) + 1.0
    weights = earlier_weights(SHAPE | {"tie_word_embeddings": False})
    for name, weight in weights.items():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
        elif "norm" in name or "embed" in name:
            weight.fill_(1.0)
    weights["lm_head.weight"] = (frequency / frequency.sum()).log()[:, None].expand(-1, 64) / 64
    return weights


def test_a_wrong_tokenizer_is_noticed(tmp_path, capsys, monkeypatch):
    counted = []
    monkeypatch.setattr(Task, "advance", lambda task, by=1: counted.append((task.what, by)))
    right = small_tokenizer(tmp_path)
    definition = json.loads(right.read_text())
    vocab = definition["model"]["vocab"]
    mixed = {token: i if i < 5 else 304 - i for token, i in vocab.items()}
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(definition | {"model": definition["model"] | {"vocab": mixed}}))
    weights = unigram_weights(load_tokenizer(vocab_size=300))
    file = write(tmp_path / "latest.pt", SHAPE | {"tie_word_embeddings": False}, weights)
    losses = []
    for tokenizer in (right, wrong):
        run = tmp_path / f"run-{tokenizer.stem}"
        args = ["import", str(file), "--run-dir", str(run), "--tokenizer", str(tokenizer)]
        assert main(args) == 0
        printed = capsys.readouterr().out
        assert ("WARNING" in printed) == (tokenizer == wrong)
        losses.append(float(re.search(r"loss on built-in English: (\S+) nats", printed)[1]))
    assert losses[0] < 0.9 * math.log(300) < losses[1]
    # Whoever waits sees how far it is: 63 rows of 64 tokens, twice.
    assert counted.count(("trying it on built-in English", 64)) == 2 * 63


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path):
    file = write(tmp_path / "latest.pt", SHAPE)
    with pytest.raises(UserError, match="--tokenizer builtin has 49,152 entries"):
        import_checkpoint(file, tmp_path / "run", "builtin")


def test_command(tmp_path):
    file = write(tmp_path / "latest.pt", SHAPE)
    tokenizer = foreign_tokenizer(tmp_path, 3)
    args = [file, "--run-dir", "run", "--tokenizer", tokenizer]
    result = forked.run_module("hamner.checkpoint", "import", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "parameters of step 99,000 (2,450,000,000 tokens) into run/" in result.stdout
    assert "not be fine-tuned to chat" in result.stdout
    with pytest.raises(UserError, match="--run-dir .*run exists already: name another folder"):
        main(
            ["import", str(file), "--run-dir", str(tmp_path / "run"), "--tokenizer", str(tokenizer)]
        )
