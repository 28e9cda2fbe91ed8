"""What changed, and how much of it could be luck in the choice of the queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

_RESAMPLES = 2000
# Values that are resampled at once, which bounds the memory whatever the number of queries.
_BATCH_VALUES = 1 << 22


@dataclass(frozen=True)
class Change:
    """One metric before and after.

    Attributes:
        before: The metric of the baseline.
        after: The metric compared with it.
        interval: Ends of the 95 % paired percentile bootstrap interval of the difference, over
            queries; None for a metric of pairs, or of a single query.

    Example:
        >>> from pairclip.evaluation import Change
        >>> change = Change(before=0.5, after=0.75, interval=(0.125, 0.375))
        >>> change.difference, change.is_clear
        (0.25, True)
    """

    before: float
    after: float
    interval: tuple[float, float] | None

    @property
    def difference(self) -> float:
        """``after - before``."""
        return self.after - self.before

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_intervals(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], *, confidence: float = 0.95
) -> npt.NDArray[np.float64] | None:
    """Percentile bootstrap intervals of mean differences, resampling the queries.

    Args:
        before: Metrics of each query, shape ``[F, Q]``.
        after: The same metrics of the same queries.
        confidence: Level of the interval.

    Returns:
        Low and high end of each, ``[F, 2]``; None for fewer than two queries. Always the same
        for the same values.
    """
    if before.shape[1] < 2:
        return None
    interval = stats.bootstrap(
        (after - before,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_VALUES // before.size),
        vectorized=True,
        axis=1,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return np.stack([interval.low, interval.high], axis=1)
