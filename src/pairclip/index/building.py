"""Images and tables of embeddings as segments of an index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairclip import _checks
from pairclip._vectors import unit_rows
from pairclip.datasets import LabelledImages
from pairclip.embedding import are_images, embed_images
from pairclip.index.segments import ROWS, Segment
from pairclip.towers import VisionTower


def images_of(name: str, dataset: Any) -> tuple[LabelledImages, bool]:
    """The images of an argument, and whether they have labels of their own."""
    if isinstance(dataset, (str, os.PathLike)):
        raise TypeError(
            f"`{name}` must be a dataset or a list of images, got the path '{dataset}'. List "
            "the files, for instance `sorted(Path(folder).rglob('*.jpg'))`."
        )
    unlabelled = are_images(dataset)
    if unlabelled:
        dataset = (dataset, np.zeros(len(dataset), np.int64))
    return LabelledImages(dataset), not unlabelled


def embedded(
    tower: VisionTower, images: LabelledImages, dtype: torch.dtype, **options: Any
) -> Segment:
    """The images' embeddings and paths."""
    embeddings = embed_images(tower, images, **options)
    paths = [images.source.path(index) for index in range(len(images))]
    return Segment(
        _units(embeddings, dtype),
        labels=None,
        paths=paths if any(path is not None for path in paths) else None,
    )


def joined_labels(
    data: LabelledImages, labelled: bool, has_labels: bool, known: list[str] | None
) -> tuple[Tensor | None, list[str] | None]:
    """Labels of images that come to those of an index, and the class names of both."""
    names = data.class_names if labelled else None
    for what, ours, theirs in (
        ("labels", has_labels, labelled),
        ("class names", known is not None, names is not None),
    ):
        if ours and not theirs:
            raise ValueError(f"`images` must have {what}, as the index has them.")
        if theirs and not ours:
            raise ValueError(f"`images` must have no {what}, since the index has none.")
    if not labelled:
        return None, known
    if known is None or names is None:
        return data.labels, None
    joined = [*known, *(name for name in names if name not in known)]
    return torch.tensor([joined.index(name) for name in names], device="cpu")[data.labels], joined


class ParquetRows(NamedTuple):
    """What Parquet files hold, as an index has it."""

    segment: Segment
    class_names: list[str] | None
    fingerprint: str | None


def read_parquet(folder: Path, dtype: torch.dtype) -> ParquetRows:
    """All rows of the Parquet files of a folder."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files are read by pyarrow. Install it: `pip install 'pairclip[tables]'`."
        ) from error
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"`folder` '{folder}' has no files *.parquet.")
    rows: list[Tensor] = []
    paths: list[str | None] = []
    labels: list[Any] = []
    fingerprints = set()
    for file in files:
        opened = parquet.ParquetFile(file)
        schema = opened.schema_arrow
        if "vector" not in schema.names:
            raise ValueError(f"'{file}' has no column 'vector', but {', '.join(schema.names)}.")
        known = (schema.metadata or {}).get(b"pairclip.fingerprint")
        fingerprints.add(None if known is None else known.decode())
        columns = [name for name in ("vector", "path", "label") if name in schema.names]
        for batch in opened.iter_batches(ROWS, columns=columns):
            if not len(batch):
                continue
            vectors = batch.column("vector")
            if vectors.null_count or vectors.flatten().null_count:
                raise ValueError(f"'{file}' has missing values in its column 'vector'.")
            values = torch.from_numpy(vectors.flatten().to_numpy(zero_copy_only=False).copy())
            if len(values) % len(batch) or (rows and len(values) // len(batch) != rows[0].shape[1]):
                raise ValueError(f"'{file}' has vectors of different lengths.")
            embeddings = values.float().reshape(len(batch), -1)
            _checks.check_finite("vector", embeddings)
            rows.append(_units(embeddings, dtype))
            empty = [None] * len(batch)
            paths += batch.column("path").to_pylist() if "path" in columns else empty
            labels += batch.column("label").to_pylist() if "label" in columns else empty
    if not rows:
        raise ValueError(f"The files *.parquet of '{folder}' have no rows.")
    if len(fingerprints) > 1:
        raise ValueError(f"The files *.parquet of '{folder}' were made by several towers.")
    ids, names = _ids_of(labels, folder)
    found = Segment(torch.cat(rows), ids, paths if any(p is not None for p in paths) else None)
    return ParquetRows(found, names, fingerprints.pop())


def _ids_of(labels: list[Any], folder: Path) -> tuple[Tensor | None, list[str] | None]:
    kinds = {type(label) for label in labels}
    if kinds == {type(None)}:
        return None, None
    if kinds == {int}:
        return torch.tensor(labels, device="cpu"), None
    if kinds == {str}:
        names = sorted(set(labels))
        numbers = {name: number for number, name in enumerate(names)}
        return torch.tensor([numbers[label] for label in labels], device="cpu"), names
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(
        f"The column 'label' of '{folder}' must be all texts or all integers, got {found}."
    )


def _units(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    units = torch.empty_like(embeddings, dtype=dtype)
    for start in range(0, len(embeddings), ROWS):
        units[start : start + ROWS] = unit_rows(embeddings[start : start + ROWS])
    return units
