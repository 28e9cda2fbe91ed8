"""What is known of a collection's images, and what is wrong with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pairclip.datasets import LabelledImages


@dataclass
class Item:
    """One image of the collection and what was seen of it."""

    part: str
    index: int
    path: str | None
    class_name: str
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    pixels: str = ""
    problem: str | None = None

    @property
    def name(self) -> str:
        """Its file, or its place."""
        return self.path or f"{self.part} image {self.index}"


@dataclass(frozen=True)
class Problem:
    """Something to look at: what, why, and the images that it is about."""

    detail: str
    items: tuple[int, ...] = ()


@dataclass
class Check:
    """What was found.

    Attributes:
        parts: The images by the name of their part.
        items: All of them, one part after the other.
        problems: By title, in the order of a page.
        suspicion: How doubtful each item's label is; NaN where that wasn't looked at.
        drop: Places in `items` that a clean table leaves out.
    """

    parts: Mapping[str, LabelledImages]
    items: list[Item]
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    suspicion: Any = None
    drop: set[int] = field(default_factory=set)

    def image(self, place: int) -> Image.Image:
        """The image of an item."""
        item = self.items[place]
        image: Image.Image = self.parts[item.part][item.index][0]
        return image

    def to_dict(self) -> dict[str, Any]:
        """Counts and lists, as JSON takes them."""
        classes: dict[str, Counter[str]] = defaultdict(Counter)
        for item in self.items:
            classes[item.part][item.class_name] += 1
        return {
            "images": len(self.items),
            "classes": {part: dict(sorted(counts.items())) for part, counts in classes.items()},
            "problems": {
                title: [
                    {
                        "detail": problem.detail,
                        "images": [self.items[place].name for place in problem.items],
                    }
                    for problem in problems
                ]
                for title, problems in self.problems.items()
            },
        }
