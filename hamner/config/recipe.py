"""A recipe says how a model learns: optimizer, learning rates, weight decay and schedule, as data.

`plan` is the plan as it was written, `adamw` the same optimizer tuned, `muon` the fastest that was
measured (docs/recipes.md). A recipe is a row of defaults, of which every flag may change a part.
"""

from dataclasses import dataclass
from typing import Literal

Recipe = Literal["plan", "adamw", "muon"]


@dataclass(frozen=True)
class RecipeConfig:
    """These flags say how the model learns; the defaults are those of --recipe.

    Parameters are of three groups: the hidden matrices (of attention, MLP and experts), the
    embedding with the head and the router, and the vectors (norms and lambdas), which never decay.
    """

    recipe: Recipe = "plan"
    """learning rates, optimizer, weight decay and schedule to start from"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """of the hidden matrices; all else has AdamW"""
    lr: float = 2e-4
    """peak learning rate"""
    embedding_lr: float | None = None
    """peak learning rate of embedding, head and router; default --lr"""
    vector_lr: float | None = None
    """peak learning rate of norms and other vectors; default --lr"""
    min_lr: float = 2e-5
    """learning rate at the end of the run, for a peak of --lr; other groups' is in proportion"""
    warmup_steps: int = 2_000
    """steps of linear warm-up"""
    decay: Literal["cosine", "linear", "wsd"] = "cosine"
    """how the learning rate falls after the warm-up: wsd stays at its peak, then falls linearly"""
    decay_fraction: float = 0.2
    """with --decay wsd: share of the run in which it falls"""
    embedding_weight_decay: float | None = None
    """decoupled weight decay of embedding, head and router; default --weight-decay"""
    beta1: float = 0.9
    """AdamW's decay of the first moment"""
    beta2: float = 0.95
    """AdamW's decay of the second moment"""
    momentum: float = 0.95
    """Muon's decay of the momentum"""


RECIPES: dict[str, dict] = {
    "plan": {},
    "adamw": {"lr": 1e-3, "embedding_lr": 3e-3, "min_lr": 0.0, "decay": "linear"},
    "muon": {
        "optimizer": "muon",
        "lr": 2e-3,
        "embedding_lr": 6e-3,
        "beta2": 0.9875,
        "min_lr": 0.0,
        "decay": "linear",
    },
}
"""what each recipe changes of an option's defaults: what the search of docs/recipes.md found, but
for Muon's weight decay, which runs of 813 steps say nothing about for one of 400,000"""
RECIPE_MODELS: dict[str, dict] = {"muon": {"qk_norm": True}}
"""what a recipe changes of an option's model, where that was measured to be worth its time"""
