"""Which images of a dataset can't be read, and what is seen of those that can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL import Image
from torch.utils.data import Dataset

from pairclip import _checks
from pairclip._progress import progress
from pairclip._randomness import random_state_kept
from pairclip.datasets.loading import HostLoader
from pairclip.datasets.source import LabelsDiffer, Source, reason_of

_AT_ONCE = 32
_NAMED = 3  # problems in a message
Result = TypeVar("Result")


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
    attempts = look_at(source, _nothing, num_workers=num_workers)
    return [problem for problem in attempts if problem is not None]


def in_words(problems: Sequence[Problem]) -> str:
    """The first few problems, and how many more there are."""
    words = [f"{p.path or f'image {p.index}'}: {p.reason}" for p in problems[:_NAMED]]
    more = len(problems) - _NAMED
    return "; ".join(words + [f"and {more:,} more"] * (more > 0))


def look_at(
    source: Source, look: Callable[[Image.Image, str | None], Result], *, num_workers: int = 0
) -> Iterator[Result | Problem]:
    """Read every image of a source once.

    Args:
        source: The images.
        look: Gets each image in RGB and its path, where the source tells.
        num_workers: Processes that read; 0 does it in this one.

    Yields:
        In order, what `look` says of an image, or what is wrong where it can't be read.
    """
    _checks.check_count("num_workers", num_workers)
    if source.of_features:
        raise TypeError("`dataset` must be of images, got cached features.")
    loader = HostLoader(
        _Attempts(source, look),
        batch_size=_AT_ONCE,
        num_workers=num_workers,
        collate_fn=list,
    )
    bar = progress(total=len(source.labels), desc="Checking images", unit="image", leave=False)
    with random_state_kept(), bar:
        for attempts in loader:
            yield from attempts
            bar.update(len(attempts))


def _nothing(image: Image.Image, path: str | None) -> None:
    pass


class _Attempts(Dataset["Result | Problem"], Generic[Result]):
    """What is seen of each image, or wrong with it."""

    def __init__(self, source: Source, look: Callable[[Image.Image, str | None], Result]) -> None:
        self.source, self.look = source, look

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Result | Problem:
        path = self.source.known_path(index)
        try:
            image = self.source.read(index)
        except LabelsDiffer:
            raise  # no fault of the image
        except (ValueError, TypeError) as error:
            return Problem(index, path, reason_of(error.__cause__ or error))
        return self.look(image, path)
