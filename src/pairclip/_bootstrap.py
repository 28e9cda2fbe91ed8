"""How much of a change could be luck in the choice of the queries."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

_RESAMPLES = 2000
# Values that are resampled at once, which bounds the memory whatever the number of queries.
_BATCH_VALUES = 1 << 22


def paired_intervals(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], *, confidence: float = 0.95
) -> npt.NDArray[np.float64] | None:
    """Percentile bootstrap intervals of mean differences, resampling the queries.

    Args:
        before: Figures of each query, shape ``[F, Q]``.
        after: The same figures of the same queries.
        confidence: Level of the interval.

    Returns:
        Low and high end of each, ``[F, 2]``; None for fewer than two queries. Always the same
        for the same figures.
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
