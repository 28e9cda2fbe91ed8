"""Logging to the trackers that Accelerate knows."""

from __future__ import annotations

import os
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers

from pairclip import _checks
from pairclip.callbacks.base import Callback, FitState


class Tracker(Callback):
    """Logs every step and evaluation to trackers of Accelerate: TensorBoard, W&B, MLflow, ...

    Args:
        tracker: Name that Accelerate knows (``"tensorboard"``, ``"wandb"``, ...), or a
            `GeneralTracker` of your own.
        folder: Where a tracker that writes files puts them; needed for TensorBoard.
        run_name: Name of the run; TensorBoard's files go into ``folder/run_name``.
        every: Steps between logged steps.

    Raises:
        ValueError: If Accelerate has no such tracker, it is not installed, or it needs a `folder`.

    Example:
        >>> from pairclip import Tracker
        >>> callback = Tracker("tensorboard", "runs/logs")
    """

    only_watches = True

    def __init__(
        self,
        tracker: str | GeneralTracker,
        folder: str | os.PathLike[str] | None = None,
        *,
        run_name: str = "pairclip",
        every: int = 1,
    ) -> None:
        _checks.check_positive_int("every", every)
        if tracker == "all":
            raise ValueError("`tracker` must be one, got 'all'. Use a `Tracker` for each.")
        needs = getattr(LOGGER_TYPE_TO_CLASS.get(str(tracker)), "requires_logging_directory", False)
        if needs and folder is None:
            raise ValueError(f"`tracker` {tracker!r} writes files, so it needs a `folder`.")
        try:
            trackers = filter_trackers([tracker], folder)
        except ValueError as error:
            raise ValueError(f"`tracker` {tracker!r} can't be used: {error}") from error
        if not trackers:
            raise ValueError(f"`tracker` {tracker!r} is not installed. Install its package.")
        self.chosen: Any = trackers[0]
        self.folder = folder
        self.run_name = run_name
        self.every = every
        self.tracker: Any = None

    def on_fit_start(self, fit: FitState) -> None:
        """Open the tracker, and log what the fit was asked for."""
        self._finish()  # an interrupted fit left it open, and MLflow has one run at a time
        self.tracker = self.chosen
        if not isinstance(self.chosen, GeneralTracker):
            kind: Any = LOGGER_TYPE_TO_CLASS[str(self.chosen)]
            options: dict[str, Any] = {}
            if str(self.chosen) == "tensorboard":
                # What was logged after the checkpoint that a fit resumes from happens again, and
                # all of it where there was none yet.
                options["purge_step"] = fit.step + 1
            where = [self.folder] if kind.requires_logging_directory else []
            self.tracker = kind(self.run_name, *where, **options)
        if hasattr(self.tracker, "start"):  # older Accelerates start them when they are made
            self.tracker.start()
        self.tracker.store_init_configuration(
            {key: value for key, value in fit.config.items() if value is not None}
        )

    def on_step(self, fit: FitState) -> None:
        """Log loss, learning rate and gradient norm."""
        if fit.step % self.every == 0:
            record = fit.steps[-1]
            names = ("loss", "learning_rate", "gradient_norm")
            self._log({f"train/{name}": record[name] for name in names}, fit.step)

    def on_evaluation(self, fit: FitState) -> None:
        """Log every figure of the evaluation."""
        self._log({f"eval/{key}": value for key, value in fit.evaluations[-1].items()}, fit.step)

    def on_fit_end(self, fit: FitState) -> None:
        """Close the tracker."""
        self._finish()

    def _finish(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()
            self.tracker = None

    def _log(self, values: dict[str, Any], step: int) -> None:
        self.tracker.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step)
