"""Histograms of the similarities of all pairs."""

from __future__ import annotations

import math
from threading import Lock

import torch
from torch import Tensor

from pairclip.retrieval.blocks import NO_ITEM, Block, Search, over_blocks

BINS = 1 << 20
# The range of pairs in so few bins is read from their similarities.
_FEW = 8


class PairCounts:
    """Pairs of a search, in equal bins of similarity; each pair of items is counted once."""

    def __init__(self, search: Search, low: float = -1.0, width: float = 2 / BINS) -> None:
        self.low, self.width = low, width
        self._search = search
        self._all: Tensor = search.counts.new_zeros(BINS)
        self.same: Tensor = search.counts.new_zeros(BINS)
        self._adding = Lock()

    @property
    def different(self) -> Tensor:
        """Pairs of different classes in each bin, int64."""
        different: Tensor = self._all - self.same
        return different

    def add(self, block: Block) -> None:
        """Count the pairs of these queries."""
        bins = (block.scores - self.low).mul_(1 / self.width).clamp_(0, BINS - 1).to(torch.int32)
        bins[:, len(self._search.items) :] = BINS
        if self._search.own:
            columns = torch.arange(bins.shape[1], device=bins.device)
            bins.masked_fill_(columns <= block.rows[:, None], BINS)
        if self._search.slots is not None:
            bins.masked_fill_(block.scores == NO_ITEM, BINS)
        every, same = _counts(bins), _counts(bins.gather(1, block.members))
        with self._adding:
            self._all += every
            self.same += same

    def add_all(self, rows: Tensor) -> None:
        """Count the pairs of all these queries."""
        for _ in over_blocks(self._search, rows, self.add):
            pass

    def coarse(self, bins: int = 200) -> tuple[Tensor, Tensor, Tensor]:
        """Edges of fewer bins, float64, and the pairs of one class and of two in each, int64."""
        edges = torch.linspace(0, BINS, bins + 1, dtype=torch.float64, device="cpu")
        sizes = edges.round().long().diff().tolist()
        same, different = (
            torch.stack([part.sum() for part in counts.split(sizes)])
            for counts in (self.same, self.different)
        )
        return self.low + self.width * edges, same, different

    def over_range(self, low: float, high: float) -> PairCounts:
        """No counts yet, of bins from `low` to `high`, as narrow as numbers can tell apart."""
        # A power of two, so that no similarity is rounded into another bin; and one whose inverse
        # is a number.
        smallest = 2.0**-1000 if self._search.items.dtype == torch.float64 else 2.0**-100
        width = max(2.0 ** math.ceil(math.log2((high - low) / (BINS - 1))), smallest)
        return PairCounts(self._search, low, width)

    def range(self) -> tuple[float, float]:
        """The lowest and the highest similarity; to a bin, where those are many bins apart."""
        first, last = self._ends()
        if last - first >= _FEW:
            # A bin more on either side, for similarities that rounding has put beyond 1.
            return self.low + (first - 1) * self.width, self.low + (last + 2) * self.width
        ranges = torch.stack([*over_blocks(self._search, self._search.rows(), self._range)])
        return float(ranges[:, 0].min()), float(ranges[:, 1].max())

    def _range(self, block: Block) -> Tensor:
        no_pair = block.scores == NO_ITEM
        if self._search.own:
            columns = torch.arange(block.scores.shape[1], device=block.rows.device)
            no_pair |= columns <= block.rows[:, None]
        low = block.scores.masked_fill(no_pair, torch.inf).min()
        return torch.stack([low, block.scores.masked_fill(no_pair, -torch.inf).max()])

    def exact(self) -> bool:
        """Whether bins are too narrow for two different similarities."""
        first, last = self._ends()
        low, high = self.low + first * self.width, self.low + (last + 1) * self.width
        if low * high <= 0:
            return False
        exponent = math.frexp(min(abs(low), abs(high)))[1] - 1
        return self.width <= torch.finfo(self._search.items.dtype).eps * 2.0**exponent

    def filled(self) -> Tensor:
        """Bins with pairs, ascending, int64 ``[F]``."""
        return self._all.nonzero()[:, 0]

    def _ends(self) -> tuple[int, int]:
        filled = self.filled()
        return int(filled[0]), int(filled[-1])


def _counts(bins: Tensor) -> Tensor:
    return torch.bincount(bins.flatten(), minlength=BINS + 1)[:BINS]
