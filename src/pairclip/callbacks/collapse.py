"""Saying when training can't work."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from torch import Tensor

from pairclip import _checks
from pairclip._vectors import unit_rows
from pairclip.callbacks.base import Callback, FitState


class CollapseMonitor(Callback):
    """Says in words when training can't work: collapsed embeddings, useless batches.

    It warns, once per fit and finding, when the mean similarity of a batch's pairs of different
    classes is above a threshold; when a batch has one class only; and when the loss's gradient is
    zero. After the last step it says how many batches that were.

    Args:
        threshold: Mean cosine of different pairs above which embeddings count as collapsed.
        every: Steps between looks; each look waits for the device.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from pairclip import CollapseMonitor
        >>> callback = CollapseMonitor(threshold=0.98)
    """

    only_watches = True

    def __init__(self, threshold: float = 0.95, *, every: int = 1) -> None:
        _checks.check_in("[-1, 1)", "threshold", threshold)
        _checks.check_positive_int("every", every)
        self.threshold = threshold
        self.every = every
        self.looks = 0
        self.findings: Counter[str] = Counter()

    def on_fit_start(self, fit: FitState) -> None:
        """Start afresh, unless the fit resumes."""
        if fit.step == 0:
            self.looks, self.findings = 0, Counter()

    def on_step(self, fit: FitState) -> None:
        """Look at the batch."""
        if fit.step % self.every:
            return
        self.looks += 1
        labelled = fit.labels >= 0  # the others are to stay where they are
        labels, embeddings = fit.labels[labelled], fit.embeddings[labelled]
        if len(labels.unique()) == 1:
            self._say(
                fit,
                "batches of one class",
                f"all {len(labels)} images of the batch are of one class, so nothing moves "
                "classes apart. Use `ClassBalancedSampler` or `PairSampler`, or shuffle.",
            )
        elif (similarity := _different_mean(embeddings, labels)) > self.threshold:
            self._say(
                fit,
                "batches with collapsed embeddings",
                f"images of different classes have a mean similarity of {similarity:.3f}: the "
                "embeddings collapse to one direction. Lower `learning_rate`, give different "
                "pairs more weight (a lower `positive_fraction`), or check the labels.",
            )
        if not bool(fit.gradient.any()):
            self._say(
                fit,
                "batches with a zero gradient",
                "the loss's gradient is zero, so the step trains nothing. With a hinge or a miner "
                "no pair may be left: raise the margin, or use another form of the loss.",
            )

    def on_fit_end(self, fit: FitState) -> None:
        """Say how often each finding was made."""
        if self.findings and fit.accelerator.is_main_process:
            counts = ", ".join(f"{count} {what}" for what, count in self.findings.items())
            warnings.warn(f"Of {self.looks} batches looked at: {counts}.", stacklevel=2)

    def _say(self, fit: FitState, what: str, message: str) -> None:
        self.findings[what] += 1
        if self.findings[what] == 1 and fit.accelerator.is_main_process:
            warnings.warn(f"At step {fit.step}, {message}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """What was found so far."""
        return {"looks": self.looks, "found": dict(self.findings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.looks, self.findings = state["looks"], Counter(state["found"])


def _different_mean(embeddings: Tensor, labels: Tensor) -> float:
    """Mean cosine over the pairs of different classes."""
    rows = unit_rows(embeddings)
    classes, of_row, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, of_row, rows)
    pairs = len(rows) ** 2 - int(counts.square().sum())
    return float((sums.sum(dim=0).square().sum() - sums.square().sum()) / pairs)
