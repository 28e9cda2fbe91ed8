"""Tables with a row for each image: CSV, TSV, Parquet, JSON lines, pandas and Arrow."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pairclip.datasets.rgb import as_rgb
from pairclip.datasets.source import Source
from pairclip.datasets.table_rows import (
    BOXES,
    check_names,
    classes_of,
    is_text_file,
    rows_of,
    rows_of_split,
)


class TableDataset(Dataset[tuple[Image.Image, int]]):
    r"""A table with a row for each image. Needs ``pip install "pairclip[tables]"``.

    Tables of open-metric-learning are read as they are: columns "x_1", "y_1", "x_2" and "y_2" are
    boxes in pixels of the upright image, and what is in the box is the image (all of it where a
    row has no box).

    Args:
        table: Path of a CSV, TSV, Parquet or JSON lines file, or a pandas or pyarrow table.
        image: Column of the images: paths, encoded images (bytes), or Hugging Face's structs of
            both.
        label: Column of the labels, integers or names; or several, whose values are joined by "/".
            In text files they are integers if each row has one, without leading zeros.
        root: What relative paths start from. None is the folder of the table if the first image
            that a row has is there, else the working directory.
        split: Only some rows: a value of the column "split", the name of a column of booleans, or
            a dict from columns to values, such as ``{"fold": 3}``.

    Attributes:
        labels: Class id of each image, int64 ``[N]``, -1 where there is none.
        class_names: Name of each class id, or None.

    Raises:
        ValueError: If there is no such column, split or row.
        FileNotFoundError: If the table or its first image is missing.
        TypeError: If `table` is something else.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from pairclip import LabelledImages, TableDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (8, 6)).save(Path(folder) / "1.png")
        ...     table = Path(folder) / "images.csv"
        ...     _ = table.write_text("path,label,split\n1.png,cat,train\n2.png,dog,test\n")
        ...     dataset = TableDataset(table, image="path", label="label", split="train")
        ...     data = LabelledImages(dataset)
        ...     data.class_names, data[0][0].size
        (['cat'], (8, 6))
    """

    def __init__(
        self,
        table: Any,
        *,
        image: str,
        label: str | Sequence[str],
        root: str | os.PathLike[str] | None = None,
        split: str | Mapping[str, Any] | None = None,
    ) -> None:
        labels = [label] if isinstance(label, str) or not isinstance(label, Sequence) else [*label]
        if not labels or not all(isinstance(name, str) for name in (image, *labels)):
            raise TypeError(
                f"`image` and `label` must be names of columns, got {image!r} and {label!r}."
            )
        rows = rows_of(table, split, text=[image, *labels])
        check_names(rows.column_names, [image, *labels])
        if split is not None:
            rows = rows_of_split(rows, split)
        elif "split" in rows.column_names:
            values = rows["split"].unique().to_pylist()
            if len(values) > 1:
                warnings.warn(
                    f"The table has a column 'split' with {values[:8]}, and all its rows are "
                    "taken. Choose one with `split=`.",
                    stacklevel=2,
                )
        if not rows.num_rows:
            raise ValueError(
                "The table has no rows" + ("." if split is None else f" for split {split!r}.")
            )
        beside = Path(table).parent if isinstance(table, (str, os.PathLike)) else None
        self.source = TableSource(
            self, rows, image, classes_of(rows, labels, is_text=is_text_file(table)), root, beside
        )
        self._table, self._split, self._image = table, split, image
        self.labels, self.class_names = self.source.labels, self.source.class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB and its class id."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}.")
        return as_rgb(self.source.image(index)), int(self.labels[index])

    def column(self, name: str) -> list[Any] | None:
        """Values of any column of the table, read when they are asked for; None if there is none.

        Args:
            name: For instance "sequence" or "camera", which `evaluate` takes as `exclude`, or
                "category", for the groups of a `GroupSampler`.

        Returns:
            One for each image; of text files as they are written.
        """
        try:
            rows = rows_of(self._table, self._split, text=[self._image, name])
            check_names(rows.column_names, [name])
        except ValueError:
            return None
        if self._split is not None:
            rows = rows_of_split(rows, self._split)
        values: list[Any] = rows[name].to_pylist()
        return values


class TableSource(Source):
    """A column of images with their class ids."""

    makes_images = True

    def __init__(
        self,
        dataset: TableDataset,
        rows: Any,
        image: str,
        classes: tuple[Tensor, list[str] | None],
        root: str | os.PathLike[str] | None,
        beside: Path | None,
    ) -> None:
        super().__init__(dataset, *classes)
        self._images = rows[image]
        self._boxes = None
        if {*BOXES} <= {*rows.column_names}:
            sides = [rows[name].to_numpy() for name in BOXES]
            self._boxes = np.stack(sides, axis=1).astype(np.float64)
        self._root = "" if root is None else os.fspath(root)
        entries = map(self._entry, range(len(rows)))
        first = next((entry for entry in entries if entry is not None), None)
        if not isinstance(first, (str, bytes, type(None))):
            raise TypeError(
                "The image column must have paths, bytes, or structs of both, got "
                f"{type(first).__name__}."
            )
        if isinstance(first, str) and root is None and beside is not None:
            if (beside / first).exists():
                self._root = os.fspath(beside)
            elif not os.path.exists(first):
                raise FileNotFoundError(
                    f"The first image, '{first}', is neither in '{beside}', where the table is, "
                    "nor in the working directory. Say with `root=` where paths start."
                )

    def _entry(self, index: int) -> Any:
        value = self._images[index].as_py()
        if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        return value

    def image(self, index: int) -> Any:
        """A path or an encoded image; or what is in its box."""
        entry = self._entry(index)
        if entry is None:
            raise ValueError("there is no image in the row.")
        image = os.path.join(self._root, entry) if isinstance(entry, str) else entry
        box = None if self._boxes is None else self._boxes[index]
        return image if box is None or np.isnan(box).all() else _in_box(as_rgb(image), box)

    def path(self, index: int) -> str | None:
        """The path, unless the table has the image itself."""
        image = self._entry(index)
        return os.path.join(self._root, image) if isinstance(image, str) else None

    def identity(self, index: int) -> bytes | None:
        """The encoded image, or what tells its file; and the box in it."""
        entry = self._entry(index)
        image = entry if isinstance(entry, bytes) else super().identity(index)
        return (
            image if image is None or self._boxes is None else image + self._boxes[index].tobytes()
        )


def _in_box(image: Image.Image, box: Any) -> Image.Image:
    left, top, right, bottom = box
    x_1, y_1 = max(left, 0), max(top, 0)
    x_2, y_2 = min(right, image.width), min(bottom, image.height)
    if not (x_1 < x_2 and y_1 < y_2):
        raise ValueError(
            f"its box, x_1 {left:g}, y_1 {top:g}, x_2 {right:g} and y_2 {bottom:g}, has nothing of "
            f"the image of {image.width} x {image.height} pixels."
        )
    return image.crop((round(x_1), round(y_1), round(x_2), round(y_2)))
