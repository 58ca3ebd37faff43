"""When more training no longer helps: the validation loss decides."""

import math


class EarlyStopping:
    """Watches the validation loss of a run.

    Args:
        patience: evaluations without a better loss after which the run should stop; 0 never stops
            it and looks for no best one.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_loss = math.inf
        self.best_step: int | None = None
        self.evaluations_since_best = 0

    def improved(self, step: int, val_loss: float | None) -> bool:
        """Take the loss of an evaluation (None without validation data); whether it is the best."""
        if not self.patience or val_loss is None:
            return False
        # A loss that is not a number is no improvement either.
        if val_loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_since_best = val_loss, step, 0
            return True
        self.evaluations_since_best += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return 0 < self.patience <= self.evaluations_since_best

    def state_dict(self) -> dict:
        """For `load_state_dict`, and for `checkpoint.best`: JSON, part of a checkpoint."""
        return {
            "best_loss": None if self.best_step is None else self.best_loss,
            "best_step": self.best_step,
            "evaluations_since_best": self.evaluations_since_best,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken, if it was; the patience may be another."""
        self.best_step = state.get("best_step")
        self.best_loss = math.inf if self.best_step is None else state["best_loss"]
        self.evaluations_since_best = state.get("evaluations_since_best", 0)
