"""Text from a model, token by token."""

import torch
from torch import Tensor

from hamner.data.tokenizer import Tokenizer
from hamner.model import Transformer

PROMPTS = ("The history of", "In order to", "The most important")
"""What every run continues, so that samples over time can be compared."""


@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Continue `prompt` until the end of text or `max_new_tokens`.

    Args:
        model: any option.
        tokenizer: the model's.
        prompt: text; without any token, generation starts from the end-of-text token.
        max_new_tokens: most tokens to add.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: tokens to choose from.
        seed: of the choice.

    Returns:
        The continuation alone.
    """
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenizer.encode(prompt) or [tokenizer.eot_id]
    prompt_length = len(tokens)
    for _ in range(max_new_tokens):
        context = torch.tensor([tokens[-model.config.max_seq_len :]], device=device)
        logits = model(context).logits[0, -1].float().cpu()
        # Rows of the embedding beyond the tokenizer have no text.
        token = _choose(logits[: tokenizer.vocab_size], temperature, top_k, generator)
        if token == tokenizer.eot_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[prompt_length:])


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, indices = (logits / temperature).topk(min(top_k, len(logits)))
    return int(indices[torch.multinomial(values.softmax(-1), 1, generator=generator)])
