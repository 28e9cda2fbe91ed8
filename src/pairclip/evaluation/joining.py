"""Queries and gallery together: classes joined by name, and what a query isn't compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairclip.datasets import LabelledImages
from pairclip.datasets.labels import is_missing, join_named


def joined_labels(
    queries: LabelledImages, gallery: LabelledImages
) -> tuple[Tensor, Tensor, list[str] | None]:
    """Class ids that mean the same in both datasets, and the classes in the order of their names.

    Raises:
        ValueError: If only one dataset has names, or several of its classes have the same.
    """
    labels, names = join_named(
        {
            "`queries`": (queries.labels, queries.class_names),
            "`gallery`": (gallery.labels, gallery.class_names),
        }
    )
    if names is not None:
        rank = torch.from_numpy(np.argsort(np.argsort(names)))
        labels, names = [rank[each] for each in labels], sorted(names)
    return labels[0], labels[1], names


def groups_of(*columns: Sequence[Any]) -> list[Tensor]:
    """A number for each value of columns that belong together, -1 where there is none."""
    ids: dict[Any, int] = {}
    return [
        torch.tensor(
            [-1 if is_missing(value) else ids.setdefault(value, len(ids)) for value in column],
            dtype=torch.int64,
            device="cpu",
        )
        for column in columns
    ]


def column_of(name: str, exclude: Any, data: LabelledImages, what: str) -> list[Any]:
    """Values of the argument `name` for each image, which may be a column's name.

    Raises:
        ValueError: If the dataset has no such column, or there is not one value for each image.
    """
    values = exclude
    if isinstance(exclude, str):
        values = data.source.column(exclude)
        if values is None:
            raise ValueError(
                f"`{name}` must be a column of `{what}`, which has none called {exclude!r}. Give "
                "one value for each image instead."
            )
    if isinstance(values, Tensor):
        values = values.cpu().numpy()
    values = values.tolist() if isinstance(values, np.ndarray) else list(values)
    if len(values) != len(data):
        raise ValueError(
            f"`{name}` must have one value for each image of `{what}`, got {len(values)} for "
            f"{len(data)}."
        )
    return values
