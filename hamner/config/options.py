"""An option is a model with the batch, the schedule and the rhythm it is trained with."""

from dataclasses import replace

from hamner.config.model import ModelConfig
from hamner.config.recipe import RECIPE_MODELS, RECIPES
from hamner.config.train import TrainConfig
from hamner.errors import UserError

_A = ModelConfig()
_CURRENT = ModelConfig(
    hidden_size=768, num_layers=20, num_attention_heads=12, expert_intermediate_size=2048
)
_C = replace(_CURRENT, expert_intermediate_size=1536, num_experts=4, num_experts_per_token=2)
_TINY = ModelConfig(
    hidden_size=256,
    num_layers=4,
    num_attention_heads=4,
    num_kv_heads=2,
    expert_intermediate_size=704,
    max_seq_len=256,
    vocab_size=4_096,
)
_TOKENS = 10_000_000_000
"""what every option but `tiny` is planned to train on"""

OPTIONS: dict[str, TrainConfig] = {
    config.option: config
    for config in (
        # The built-in demo for a laptop CPU.
        TrainConfig(
            model=_TINY,
            option="tiny",
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
        # 164M, the baseline.
        TrainConfig(model=_CURRENT, option="current", batch_size=48, tokens=_TOKENS),
        # 321M, recommended.
        TrainConfig(model=_A, option="a", tokens=_TOKENS),
        # a, pre-trained at 512 tokens.
        TrainConfig(model=_A, option="a-short", seq_len=512, batch_size=32, tokens=_TOKENS),
        # 264M, deep.
        TrainConfig(model=replace(_CURRENT, num_layers=36), option="b", tokens=_TOKENS),
        # 352M mixture of experts, 211M active.
        TrainConfig(model=_C, option="c", tokens=_TOKENS),
        # 352M mixture of experts with a shared one, 282M active.
        TrainConfig(
            model=replace(_C, num_experts=3, num_shared_experts=1),
            option="c-shared",
            tokens=_TOKENS,
        ),
    )
}


def find_option(name: str) -> TrainConfig:
    """The function finds an option by its name.

    Raises:
        UserError: There is no such option.
    """
    if name not in OPTIONS:
        raise UserError(f"--option {name} is not one of {', '.join(OPTIONS)}")
    return OPTIONS[name]


def for_option(name: str, recipe: str = "plan") -> TrainConfig:
    """The function gives an option as the defaults of a run, whose length `--steps` may still set.

    Raises:
        UserError: There is no such option or recipe.
    """
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe} is not one of {', '.join(RECIPES)}")
    option = find_option(name)
    model = replace(option.model, **RECIPE_MODELS.get(recipe, {}))
    return replace(option, model=model, tokens=None, recipe=recipe, **RECIPES[recipe])


def total_tokens(config: TrainConfig) -> int:
    """The function gives the length of a run in tokens, whole steps; by default its option's.

    Raises:
        UserError: The option alone says how long the run is, and there is no such option.
    """
    if config.steps is not None:
        return config.steps * config.tokens_per_step
    tokens = config.tokens if config.tokens is not None else find_option(config.option).tokens
    return max(1, int(tokens) // config.tokens_per_step) * config.tokens_per_step
