"""Which images of a dataset can't be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from pairclip import _checks
from pairclip._progress import progress
from pairclip._randomness import random_state_kept
from pairclip.datasets.notices import Notices
from pairclip.datasets.source import Source

_AT_ONCE = 32


@dataclass(frozen=True)
class Problem:
    """An image that can't be read.

    Attributes:
        index: Its place in the dataset.
        path: Its file, where the dataset tells.
        reason: What is wrong.
    """

    index: int
    path: str | None
    reason: str


def problems_of(source: Source, *, num_workers: int = 0) -> list[Problem]:
    """Read every image of a source once, and list those that can't be read."""
    _checks.check_count("num_workers", num_workers)
    if source.of_features:
        raise TypeError("`dataset` must be of images, got cached features.")
    loader = DataLoader(
        _Attempts(source),
        batch_size=_AT_ONCE,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else the loader draws from the caller's
    )
    problems: list[Problem] = []
    bar = progress(total=len(source.labels), desc="Checking images", unit="image")
    with random_state_kept(), bar:
        for attempts in loader:
            problems += [problem for problem in attempts if problem is not None]
            bar.update(len(attempts))
    return problems


class _Attempts(Dataset["Problem | None"]):
    """What is wrong with each image."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.notices = Notices()

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Problem | None:
        try:
            self.source.read(index, self.notices)
        except (ValueError, TypeError) as error:
            reason = str(error.__cause__ or error) or type(error.__cause__).__name__
            return Problem(index, self.source.path(index), reason)
        return None
