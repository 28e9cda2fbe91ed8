"""Queries and gallery together: classes joined by name, and what a query isn't compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairclip.datasets import LabelledImages


class Joined(NamedTuple):
    """Class ids that mean the same in both datasets."""

    query_labels: Tensor
    labels: Tensor
    class_names: list[str] | None


def join_classes(queries: LabelledImages, gallery: LabelledImages) -> Joined:
    """Join the classes of two datasets by name, or by number where neither has names.

    Raises:
        ValueError: If only one has names, or two classes of one dataset have the same.
    """
    of_queries, of_gallery = queries.class_names, gallery.class_names
    if of_queries is None and of_gallery is None:
        return Joined(queries.labels, gallery.labels, None)
    if of_queries is None or of_gallery is None:
        without = "queries" if of_queries is None else "gallery"
        raise ValueError(
            "`queries` and `gallery` must both have class names, or neither, as ids of different "
            f"datasets need not mean the same; `{without}` has none. Give "
            f"`(images, [names[label] for label in labels])` as `{without}`."
        )
    for what, names in (("queries", of_queries), ("gallery", of_gallery)):
        twice = (
            {name for name in names if names.count(name) > 1} if len({*names}) < len(names) else ()
        )
        if twice:
            raise ValueError(
                f"`{what}` has several classes of one name, {sorted(twice)[0]!r}, which can't be "
                "joined by name."
            )
    names = sorted({*of_queries, *of_gallery})
    place = {name: i for i, name in enumerate(names)}
    query_labels, labels = (
        torch.tensor([place[name] for name in each.class_names or ()], device="cpu")[each.labels]
        for each in (queries, gallery)
    )
    return Joined(query_labels, labels, names)


def groups_of(*columns: Sequence[Any]) -> list[Tensor]:
    """A number for each value of columns that belong together, -1 where there is none (None)."""
    ids: dict[Any, int] = {}
    return [
        torch.tensor(
            [-1 if _is_missing(value) else ids.setdefault(value, len(ids)) for value in column],
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


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
