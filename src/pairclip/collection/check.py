"""What is known of a collection's images, and what is wrong with them."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pairclip import _files
from pairclip.datasets import LabelledImages


@dataclass
class Item:
    """One image of the collection and what was seen of it.

    Attributes:
        part: Name of the part that it is in, such as train.
        index: Its place there.
        path: Its file, where the dataset tells.
        class_name: Its class.
        problem: Why it can't be read, or None.
        size: Width and height in pixels, as a person sees it.
        mode: Of its file, as Pillow names it.
        pixels: Checksum of size and pixels.
        frames: How many images are in its file.
    """

    part: str
    index: int
    path: str | None
    class_name: str
    problem: str | None = None
    size: tuple[int, int] = (0, 0)
    mode: str = "RGB"
    pixels: str = ""
    frames: int = 1

    @property
    def name(self) -> str:
        """Its file, or its place."""
        return self.path or f"{self.part} image {self.index}"


@dataclass(frozen=True)
class Finding:
    """Something to look at: what it is, and the places in `Check.items` that it is about."""

    detail: str
    items: tuple[int, ...] = ()


@dataclass
class Check:
    """What `check_collection` found.

    Attributes:
        parts: The images by the name of their part.
        items: All of them, one part after the other.
        findings: What to look at, by kind, in the order of a page.
        suspicion: How doubtful each item's label is, float64 ``[N]``, as `suspect_labels` has it;
            NaN where that wasn't looked at.
        drop: Places in `items` that a clean table leaves out.
    """

    parts: Mapping[str, LabelledImages]
    items: list[Item]
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    suspicion: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    drop: set[int] = field(default_factory=set)

    def image(self, place: int) -> Image.Image:
        """The image of an item.

        Args:
            place: Which of `items`.

        Returns:
            The image in RGB.

        Raises:
            ValueError: If it can't be read.
        """
        item = self.items[place]
        image: Image.Image = self.parts[item.part][item.index][0]
        return image

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of images of each class, in each part."""
        classes: dict[str, Counter[str]] = defaultdict(Counter)
        for item in self.items:
            classes[item.part][item.class_name] += 1
        return {part: dict(sorted(counts.items())) for part, counts in classes.items()}

    def shorter_sides(self) -> list[float]:
        """Least, median and largest shorter side of the images that can be read, in pixels."""
        sides = [min(item.size) for item in self.items if item.problem is None]
        return [min(sides), float(np.median(sides)), max(sides)] if sides else []

    def modes(self) -> dict[str, int]:
        """Number of images that can be read of each mode, as Pillow names them."""
        modes = Counter(item.mode for item in self.items if item.problem is None)
        return dict(modes.most_common())

    def looks(self) -> str:
        """Sizes and modes in words."""
        if not (sides := self.shorter_sides()):
            return ""
        least, median, largest = sides
        words = f"{least:g} to {largest:g} pixels, {median:g} in the middle"
        words = f"{least:g} pixels" if least == largest else words
        modes = ", ".join(f"{count:,} {mode}" for mode, count in self.modes().items())
        return f"Shorter sides of {words}; modes: {modes}."

    def to_dict(self) -> dict[str, Any]:
        """Counts and findings, as JSON takes them."""
        return {
            "images": len(self.items),
            "classes": self.counts(),
            "shorter_sides": self.shorter_sides(),
            "modes": self.modes(),
            "problems": {
                kind: [
                    {
                        "detail": finding.detail,
                        "images": [self.items[place].name for place in finding.items],
                    }
                    for finding in findings
                ]
                for kind, findings in self.findings.items()
            },
        }

    def to_text(self, most: int = 10) -> str:
        """The same for a person.

        Args:
            most: How many findings of each kind are listed.

        Returns:
            Lines, without a line break at the end.
        """
        lines = []
        for part, classes in self.counts().items():
            least, largest = min(classes.values()), max(classes.values())
            each = f"{largest:,}" if least == largest else f"{least:,} to {largest:,}"
            lines.append(
                f"{part}: {sum(classes.values()):,} images, {each} of each of {len(classes):,} "
                "classes."
            )
        lines += [self.looks()] * bool(self.looks())
        for kind, findings in self.findings.items():
            lines += ["", f"{kind}: {len(findings):,}"]
            for finding in findings[:most]:
                names = ", ".join(self.items[place].name for place in finding.items[:4])
                lines.append(f"  {finding.detail}" + f": {names}" * bool(names))
            if len(findings) > most:
                lines.append(f"  and {len(findings) - most:,} more")
        return "\n".join(lines if self.findings else [*lines, "", "Nothing to look at."])

    def write_clean(self, path: str | os.PathLike[str]) -> int:
        """Write a CSV table without the images that can't be read and without copies.

        Its columns are image, label, split and doubt. The path of an image below the folder of the
        table starts there, so that both can be moved together; others are absolute. An image that
        is in two classes is left out of both; one that is in several parts stays in the last of
        them, so that nothing is evaluated that was trained on.

        Args:
            path: File to write.

        Returns:
            How many images are in it.

        Raises:
            ValueError: If an image is no file, which a table of paths can't name.
            OSError: If it can't be written.
        """
        places = [place for place in range(len(self.items)) if place not in self.drop]
        folder = Path(path).parent.resolve()
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "label", "split", "doubt"])
        for place in places:
            item, doubt = self.items[place], self.suspicion[place]
            if item.path is None or not os.path.isfile(item.path):
                raise ValueError(
                    f"'{os.fspath(path)}' would be a table of paths, and {item.name} is no file. "
                    "Save the images as files first."
                )
            row = [_path_from(folder, item.path), item.class_name, item.part]
            table.writerow([*row, "" if np.isnan(doubt) else f"{doubt:.3f}"])
        _files.write_text(Path(path), file.getvalue())
        return len(places)


def _path_from(folder: Path, path: str) -> Path:
    whole = Path(path).resolve()
    return whole.relative_to(folder) if whole.is_relative_to(folder) else whole
