"""A batch sampler's place in its epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from pairclip import _checks


class EpochSampler(ABC):
    """State of a batch sampler: (seed, epoch) decide an epoch's batches, `batch` is the next."""

    def __init__(self, seed: int) -> None:
        self._seed = _checks.check_count("seed", seed)
        self._epoch = 0
        self._batch = 0

    def _set_num_batches(self, asked: int | None, num_items: int, per_batch: int) -> None:
        """Batches of an epoch: as many as were asked for, or as cover all items."""
        if asked is not None:
            _checks.check_positive_int("num_batches", asked)
        self._num_batches = -(-num_items // per_batch) if asked is None else int(asked)

    def __repr__(self) -> str:
        where = f"at batch {self._batch} of epoch {self._epoch}"
        return f"{type(self).__name__}({self._num_batches} batches per epoch, {where})"

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._num_batches

    @abstractmethod
    def _epoch_batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        """Batches of the epoch, from number `first` on."""

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rest of the current epoch; the one after it begins at the next call."""
        epoch, batch = self._epoch, self._batch
        for indices in self._epoch_batches(epoch, batch):
            batch += 1
            self._move_to(epoch, batch)
            yield indices

    def _move_to(self, epoch: int, batch: int) -> None:
        ended = batch == len(self)
        self._epoch, self._batch = (epoch + 1, 0) if ended else (epoch, batch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self._epoch, self._batch = _checks.check_count("epoch", epoch), 0

    def state_dict(self) -> dict[str, int]:
        """Position: ``seed``, ``epoch`` and ``batch``, the number of the next batch."""
        return {"seed": self._seed, "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another sampler with the same labels and settings was.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If keys are missing or unknown, or the batch is beyond the epoch.
        """
        if set(state) != {"seed", "epoch", "batch"}:
            raise ValueError(
                f"`state` must have the keys seed, epoch and batch, got {sorted(state)}."
            )
        seed, epoch, batch = (_checks.check_count(k, state[k]) for k in ("seed", "epoch", "batch"))
        if batch > len(self):
            raise ValueError(
                f"`state` is at batch {batch}, but an epoch has {len(self)}. It comes from a "
                "sampler with other labels or settings."
            )
        self._seed = seed
        self._move_to(epoch, batch)
