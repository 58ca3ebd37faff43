"""The options: each a model with the batch, the schedule and the rhythm it is trained with."""

from dataclasses import dataclass, replace

from hamner.config.model import ModelConfig


@dataclass(frozen=True)
class Option:
    """A model with the batch, the schedule and the rhythm it is trained with."""

    name: str
    description: str
    model: ModelConfig
    seq_len: int
    batch_size: int
    tokens: int
    lr: float
    min_lr: float
    warmup_steps: int
    eval_every: int = 500
    save_every: int = 1_000
    sample_every: int = 1_000
    eval_tokens: int = 200_000
    val_fraction: float = 0.01

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_len * self.batch_size


_A = ModelConfig()
_C = ModelConfig(
    hidden_size=768,
    num_layers=20,
    num_attention_heads=12,
    expert_intermediate_size=1536,
    num_experts=4,
    num_experts_per_token=2,
)
_TINY = ModelConfig(
    hidden_size=256,
    num_layers=4,
    num_attention_heads=4,
    num_kv_heads=2,
    expert_intermediate_size=704,
    max_seq_len=256,
    vocab_size=4_096,
)


def _option(
    name: str, description: str, model: ModelConfig, seq_len: int = 1024, batch_size: int = 24
) -> Option:
    """An option with the schedule of the 10B-token plan."""
    return Option(
        name=name,
        description=description,
        model=model,
        seq_len=seq_len,
        batch_size=batch_size,
        tokens=10_000_000_000,
        lr=2e-4,
        min_lr=2e-5,
        warmup_steps=2_000,
    )


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option(
            name="tiny",
            description="the built-in demo for a laptop CPU",
            model=_TINY,
            seq_len=256,
            batch_size=8,
            tokens=520 * 256 * 8,
            lr=8e-4,
            min_lr=8e-5,
            warmup_steps=20,
            eval_every=130,
            save_every=260,
            sample_every=260,
            eval_tokens=20_480,
            val_fraction=0.05,
        ),
        _option(
            "current",
            "164M, the baseline",
            replace(
                _A,
                hidden_size=768,
                num_layers=20,
                num_attention_heads=12,
                expert_intermediate_size=2048,
            ),
            batch_size=48,
        ),
        _option("a", "321M, recommended", _A),
        _option("a-short", "a, pre-trained at 512 tokens", _A, seq_len=512, batch_size=32),
        _option(
            "b",
            "264M, deep",
            replace(
                _A,
                hidden_size=768,
                num_layers=36,
                num_attention_heads=12,
                expert_intermediate_size=2048,
            ),
        ),
        _option("c", "352M mixture of experts, 211M active", _C),
        _option(
            "c-shared",
            "352M mixture of experts with a shared one, 282M active",
            replace(_C, num_experts=3, num_shared_experts=1),
        ),
    )
}
