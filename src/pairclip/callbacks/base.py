"""What a fit tells its callbacks, and what it calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pairclip.history import History


@dataclass
class FitState:
    """A fit as its callbacks see it, the same on every process.

    Attributes:
        tower: Being trained.
        parameters: The trainable parameters, those of the loss too.
        accelerator: Of the fit.
        num_steps: Steps that the fit will take.
        evaluates: Whether there is an `eval_dataset`.
        config: What the fit was asked for, as plain values.
        history: What happened so far; `steps`, `evaluations` and `stop_reason` are its own.
        step: Steps done.
        embeddings: Of the whole last batch, detached, float32 ``[B, D]``.
        labels: Its class ids, int64 ``[B]``; -1 for images to keep.
        targets: Its targets, float32 ``[B, K]``, or None.
        gradient: Of the loss with respect to `embeddings`, ``[B, D]``; in float16 times the
            scaler's factor.
        averages: Set by a callback, one tensor for each of `parameters`: these are evaluated
            instead of them, and are what the tower is left with.
    """

    tower: nn.Module
    parameters: list[nn.Parameter]
    accelerator: Accelerator
    num_steps: int
    evaluates: bool
    config: dict[str, Any]
    history: History = field(default_factory=History)
    step: int = 0
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))
    targets: Tensor | None = None
    gradient: Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"))
    averages: list[Tensor] | None = None

    @property
    def steps(self) -> list[dict[str, float | None]]:
        """One record per step, as in `History.steps`."""
        return self.history.steps

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One record per evaluation, as in `History.evaluations`."""
        return self.history.evaluations

    @property
    def stop_reason(self) -> str | None:
        """Why the fit is to end after this step, or None."""
        return self.history.stop_reason

    def stop(self, reason: str) -> None:
        """Let the fit end after this step, evaluated and with a checkpoint.

        Args:
            reason: What `History.stop_reason` then says.
        """
        self.history.stop_reason = reason


@runtime_checkable
class Callback(Protocol):
    """What a `Finetuner` calls. Inherit from it to write only the methods that you need.

    A fit resumes with callbacks made as before. One that changes nothing of the fit may have an
    attribute ``only_watches = True``, and then other arguments, such as another folder.

    Example:
        >>> from pairclip import Callback
        >>> class StopAtLoss(Callback):
        ...     def on_step(self, fit):
        ...         if fit.steps[-1]["loss"] < 0.01:
        ...             fit.stop("the loss is below 0.01")
        >>> isinstance(StopAtLoss(), Callback)
        True
    """

    def on_fit_start(self, fit: FitState) -> None:
        """Called before the first step; when a fit resumes, after `load_state_dict`."""
        return None

    def on_step(self, fit: FitState) -> None:
        """Called after each step; the gradients of the parameters are gone by then."""
        return None

    def on_evaluation(self, fit: FitState) -> None:
        """Called after each evaluation, with the weights that were evaluated."""
        return None

    def on_fit_end(self, fit: FitState) -> None:
        """Called after the last step, with the weights that the tower is left with.

        It is not called after an error or an interruption.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors, numbers, strings, lists, tuples and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        return None


def check_callbacks(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks as a list, or a TypeError if one is none."""
    if isinstance(callbacks, Callback):
        raise TypeError(f"`callbacks` must be a list, got {callbacks!r}. Put it into one.")
    callbacks = list(callbacks)
    for callback in callbacks:
        if not isinstance(callback, Callback) or isinstance(callback, type):
            raise TypeError(
                f"`callbacks` must have the methods of `pairclip.Callback`, got {callback!r}. "
                "Inherit from it to have them."
            )
    return callbacks
