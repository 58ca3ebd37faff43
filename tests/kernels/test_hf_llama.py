"""The README's lines for a Hugging Face Llama, run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

README = Path(__file__).parents[2] / "kernels" / "README.md"

llama = pytest.importorskip(
    "transformers.models.llama.modeling_llama", reason="transformers is not installed"
)


class RecordOps(TorchDispatchMode):
    """Names every op that runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def make_model(device):
    torch.manual_seed(0)
    config = llama.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return llama.LlamaForCausalLM(config).to(device)


def plain_loss(model, input_ids):
    logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits.float(), input_ids[:, 1:].flatten())


def logits_loss_and_gradients(model, loss_function, input_ids):
    model.zero_grad()
    loss = loss_function(model, input_ids)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        return model(input_ids).logits, loss.detach(), gradients


def test_patched_llama_is_the_same_model(device, monkeypatch):
    model = make_model(device)
    input_ids = torch.randint(61, (2, 9), device=device)
    expected = logits_loss_and_gradients(model, plain_loss, input_ids)

    # Set to what they are, so that monkeypatch undoes what the README's lines change.
    for holder, name in (
        (llama.LlamaRMSNorm, "forward"),
        (llama.LlamaMLP, "forward"),
        (llama, "apply_rotary_pos_emb"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name))
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        if "modeling_llama" in block
    )
    namespace = {}
    exec(block, namespace)

    with RecordOps() as recorded:
        results = logits_loss_and_gradients(model, namespace["next_token_loss"], input_ids)
    ops = ("rms_norm", "swiglu", "rope", "linear_cross_entropy")
    assert {f"hamner::{op}" for op in ops} <= recorded.names
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
