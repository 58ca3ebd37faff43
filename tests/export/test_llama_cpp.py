"""GGUF files as llama.cpp itself reads them: tokens, greedy text, conversations."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import gguf
import pytest
import torch

from hamner.checkpoint.saved_model import SavedModel, find_saved_model
from hamner.data.chat_template import Message, render, render_prompt
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.export.__main__ import ExportConfig, export
from hamner.export.tokenizer import CONVERSATION, HARD_TEXTS, MARKED_TEXTS
from hamner.model.generate import Generator
from hamner.model.sampling import Sampling
from tests.llama_cpp import LlamaCpp, needs_llama_cpp
from tests.models import DENSE, MOE, build
from tests.saved import save_run, sharp
from tests.tokenizers import LLAMA_3, byte_level, llama3, smollm

pytestmark = needs_llama_cpp
VOCABULARY = 600
GREEDY = Sampling(temperature=0)
ENDS = {0, 4}
"""ids of the built-in tokenizer"""


def exported(tmp_path, model, kind: str | None = None, **settings) -> LlamaCpp:
    run = save_run(tmp_path / "run", model, **settings)
    path = export(ExportConfig(tmp_path / f"{kind}.gguf", "gguf", run, kind))
    return LlamaCpp(path)


def continued(saved: SavedModel, prompt: list[int], count: int) -> list[int]:
    """The tokens that follow at temperature 0 here."""
    generator = Generator(saved.build(torch.device("cpu")), saved.tokenizer)
    return list(islice(generator.tokens(prompt, GREEDY, seed=0, unpenalized=()), count))


TOKENIZERS = {
    "builtin": None,
    "gpt-2": byte_level,
    "smollm": smollm,
    "llama3": llama3,
    "qwen2": lambda: llama3(LLAMA_3.replace("{1,3}", ""), ignore_merges=False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_have_the_tokens_of_training(kind, tmp_path):
    path, size = "builtin", 49_152
    texts = HARD_TEXTS
    if kind != "builtin":
        path, size = tmp_path / "theirs.json", 512
        path.write_text(json.dumps(TOKENIZERS[kind]()))
        texts += MARKED_TEXTS
    tokenizer = load_tokenizer(str(path), size)
    shape = replace(DENSE, vocab_size=size, num_layers=1)
    theirs = exported(tmp_path, build(shape), tokenizer=str(path), chat=True)
    reserved = " ".join(tokenizer.reserved)
    for text in (*texts, reserved):
        assert theirs.tokens(text) == tokenizer.encode(text), text
    messages = [{"role": m.role, "content": m.content} for m in CONVERSATION]
    template = theirs.ask("apply-template", messages=messages[:-1])["prompt"]
    assert theirs.tokens(template, special=True) == render_prompt(CONVERSATION[:-1], tokenizer)


SHAPES = {
    "dense": DENSE,
    "untied": replace(DENSE, tie_word_embeddings=False, num_kv_heads=4),
    "other constants": replace(DENSE, rope_theta=500_000.0, rms_norm_eps=1e-3),
    "mixture": MOE,
    "qk-norm": replace(DENSE, qk_norm=True),
    "qk-norm, mixture": replace(MOE, qk_norm=True),
    "twice as long": replace(DENSE, rope_scaling="linear", rope_scaling_from=32),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_greedy_text(shape, tmp_path):
    """Of weights in which the second likeliest token is often near, in fp32."""
    shape = replace(shape, vocab_size=VOCABULARY)
    theirs = exported(tmp_path, sharp(shape))
    saved = find_saved_model(tmp_path / "run")
    prompts = [list(range(start, start + 20)) for start in range(100, 500, 20)]
    texts = ((prompt, continued(saved, prompt, 40)) for prompt in prompts)
    # A token that ends a text ends theirs.
    prompt, expected = next(pair for pair in texts if not ENDS & set(pair[1]))
    assert theirs.continuation(prompt, 40) == expected
    assert len(set(expected)) > 5


QUESTION = [Message("system", "Be kind."), Message("user", "Who is naïve, you or 你?")]
ANSWER = "I am: a model of 600 tokens (and no more), as kind as I can be; ask me twice."
TEXT = "The cat sat on the mat, then on 12 other mats, and at last on a dog's: “No!” it said."


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A run whose model knows a text and an answer by heart, so that rounding changes no token."""
    tokenizer = load_tokenizer("builtin", VOCABULARY)
    conversation = render([*QUESTION, Message("assistant", ANSWER)], tokenizer).ids
    rows = [conversation, [*tokenizer.encode(TEXT), tokenizer.eot_id]]
    length = max(map(len, rows))
    model = build(replace(DENSE, vocab_size=VOCABULARY, max_seq_len=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.mT, ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    folder = tmp_path_factory.mktemp("learned")
    return save_run(folder / "run", model, chat=True, dtype=torch.bfloat16)


@pytest.fixture(params=[None, "bf16", "q8_0"], ids=str)
def theirs(request, learned, tmp_path) -> Iterator[LlamaCpp]:
    path = export(ExportConfig(tmp_path / "model.gguf", "gguf", learned, request.param))
    yield LlamaCpp(path, context=128)


def test_a_fine_tuned_model_answers_the_same(learned, theirs):
    """By the chat template of the file, up to the token that ends a turn."""
    messages = [{"role": m.role, "content": m.content} for m in QUESTION]
    assert theirs.answer(messages, 100) == ANSWER
    saved = find_saved_model(learned)
    prompt = render_prompt(QUESTION, saved.tokenizer)
    for start in (prompt, saved.tokenizer.encode(TEXT[:12])):
        expected = continued(saved, start, 16)
        assert not ENDS & set(expected)
        assert theirs.continuation(start, 16) == expected


def tensors(path: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_q8_0_quantizes_matrices_but_routers(tmp_path):
    """Rows that its blocks do not divide stay as they were."""
    shape = replace(MOE, vocab_size=VOCABULARY, expert_intermediate_size=48)
    model = sharp(shape)
    kinds = gguf.GGMLQuantizationType
    path = exported(tmp_path, model, "q8_0", dtype=torch.bfloat16).path
    stored, kind = tensors(path), gguf.GGUFReader(path).fields["general.file_type"]
    assert kind.contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert stored["token_embd.weight"].tensor_type == kinds.Q8_0
    assert stored["blk.0.attn_q.weight"].tensor_type == kinds.Q8_0
    assert stored["blk.0.ffn_gate_exps.weight"].tensor_type == kinds.Q8_0
    assert stored["blk.0.ffn_down_exps.weight"].tensor_type == kinds.BF16
    assert stored["blk.0.ffn_gate_inp.weight"].tensor_type == kinds.BF16
    assert stored["blk.0.attn_norm.weight"].tensor_type == kinds.F32
    embedding = stored["token_embd.weight"]
    values = torch.tensor(gguf.quants.dequantize(embedding.data, kinds.Q8_0))
    weight = model.embed.weight.detach().bfloat16().float()
    assert 0 < (values - weight).abs().max() <= weight.abs().max() / 127


def test_types_are_of_gguf_alone(tmp_path):
    with pytest.raises(UserError, match="--type q8_0 is of --to gguf: leave it out with --to hf"):
        ExportConfig(tmp_path, "hf", type="q8_0")
