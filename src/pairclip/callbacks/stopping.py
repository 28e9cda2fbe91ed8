"""Stopping when an evaluation no longer improves."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pairclip import _checks
from pairclip.callbacks.base import Callback, FitState
from pairclip.checkpoints import copy_into, trained_tensors


class EarlyStopping(Callback):
    """Stops when an evaluation figure no longer improves, and restores the best weights.

    Args:
        figure: Key of `Evaluation.to_dict`.
        patience: Evaluations without improvement before it stops.
        min_delta: Least change that counts as an improvement.
        mode: Whether the figure should rise (``"max"``) or fall (``"min"``).

    Raises:
        ValueError: If an argument is out of range; from `Finetuner.fit`, if nothing is evaluated
            or the evaluation has no such figure.

    Example:
        >>> from pairclip import EarlyStopping
        >>> callback = EarlyStopping("recall_at_1", patience=2)
    """

    def __init__(
        self,
        figure: str = "mean_average_precision",
        *,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: str = "max",
    ) -> None:
        _checks.check_positive_int("patience", patience)
        _checks.check_in("[0, inf)", "min_delta", min_delta)
        _checks.check_choice("mode", mode, ("max", "min"))
        self.figure = figure
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.best: float | None = None
        self.best_step: int | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.waited = 0

    def on_fit_start(self, fit: FitState) -> None:
        """Start afresh, unless the fit resumes."""
        if not fit.evaluates:
            raise ValueError("`EarlyStopping` needs an `eval_dataset` to look at.")
        if fit.step == 0:
            self.best, self.best_step, self.best_weights, self.waited = None, None, {}, 0

    def on_evaluation(self, fit: FitState) -> None:
        """Keep the weights if they are the best so far; stop when they haven't been for long."""
        value = fit.evaluations[-1].get(self.figure)
        if not isinstance(value, float) or math.isnan(value):
            names = [key for key, other in fit.evaluations[-1].items() if isinstance(other, float)]
            raise ValueError(
                f"`figure` must be a figure of the evaluation, got {self.figure!r}, which is "
                f"{value}. It has {', '.join(names)}."
            )
        rise = 0.0 if self.best is None else value - self.best
        gain = rise if self.mode == "max" else -rise
        if self.best is None or gain > self.min_delta:
            self.best, self.best_step, self.waited = value, fit.step, 0
            trained = trained_tensors(fit.tower)
            self.best_weights = {name: t.detach().clone() for name, t in trained.items()}
            return
        self.waited += 1
        if self.waited >= self.patience:
            fit.stop(
                f"{self.figure} has not improved on {self.best:.4f} of step {self.best_step} for "
                f"{self.waited} evaluations"
            )

    def on_fit_end(self, fit: FitState) -> None:
        """Restore the best weights."""
        copy_into(trained_tensors(fit.tower), self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        """The best figure and weights, and how long ago they were."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "best_weights": self.best_weights,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.best_weights, self.waited = state["best_weights"], state["waited"]
