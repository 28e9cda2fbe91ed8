"""A moving average of the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pairclip import _checks
from pairclip.callbacks.base import Callback, FitState


class WeightAverage(Callback):
    """Exponential moving average of the weights: evaluated instead of them, and kept at the end.

    After step t the average moves towards the weights by ``1 - min(decay, (1 + t) / (10 + t))``,
    so the first steps count less and less from the start.

    Args:
        decay: Share of the old average that a step keeps, in ``[0, 1)``.

    Raises:
        ValueError: If `decay` is out of range.

    Example:
        >>> from pairclip import WeightAverage
        >>> callback = WeightAverage(decay=0.99)

    References:
        Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; Tarvainen
        and Valpola 2017, "Mean Teachers Are Better Role Models", for the exponential form.
    """

    def __init__(self, decay: float = 0.999) -> None:
        _checks.check_in("[0, 1)", "decay", decay)
        self.decay = decay
        self.averages: list[Tensor] = []

    def on_fit_start(self, fit: FitState) -> None:
        """Start from the present weights, unless the fit resumes."""
        if fit.step == 0:
            self.averages = [p.detach().clone() for p in fit.parameters]
        self.averages = [
            average.to(parameter.device)
            for average, parameter in zip(self.averages, fit.parameters, strict=True)
        ]
        fit.averages = self.averages

    def on_step(self, fit: FitState) -> None:
        """Move the average towards the weights."""
        decay = min(self.decay, (1 + fit.step) / (10 + fit.step))
        weights: list[Tensor] = list(fit.parameters)
        get_ema_multi_avg_fn(decay)(self.averages, weights, fit.step)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.averages = state["averages"]
