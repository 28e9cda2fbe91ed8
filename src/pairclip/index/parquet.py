"""Embeddings that lie in Parquet files, as a segment of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairclip import _checks
from pairclip.datasets.table_rows import arrow
from pairclip.index.building import stored_rows
from pairclip.index.segments import ROWS, Segment

_MISSING = {"", -1}  # labels that are none


class ParquetRows(NamedTuple):
    """What Parquet files hold, as an index has it."""

    segment: Segment
    class_names: list[str] | None
    fingerprint: str | None


def read_parquet(folder: Path, dtype: torch.dtype) -> ParquetRows:
    """All rows of the Parquet files of a folder."""
    pa, parquet = arrow(), arrow(".parquet")
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"`folder` '{folder}' has no files *.parquet.")
    rows: list[Tensor] = []
    paths: list[str | None] = []
    labels: list[Any] = []
    fingerprints = set()
    for file in files:
        try:
            opened = parquet.ParquetFile(file, page_checksum_verification=True)
            names = opened.schema_arrow.names
            known = (opened.schema_arrow.metadata or {}).get(b"pairclip.fingerprint")
            fingerprints.add(None if known is None else known.decode())
            if "vector" not in names:
                raise ValueError(f"it has no column 'vector', but {', '.join(names)}")
            columns = [name for name in ("vector", "path", "label") if name in names]
            row = 0
            for batch in opened.iter_batches(ROWS, columns=columns):
                if len(batch):
                    rows.append(stored_rows(_vectors(_plain(batch["vector"]), row), dtype))
                    paths += (
                        _paths(_plain(batch["path"])) if "path" in names else [None] * len(batch)
                    )
                    labels.append(_labels(_plain(batch["label"])) if "label" in names else None)
                    row += len(batch)
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"'{file}' can't be read: {error}") from error
    if not rows:
        raise ValueError(f"The files *.parquet of '{folder}' have no rows.")
    sizes = sorted({piece.shape[1] for piece in rows})
    if len(sizes) > 1:
        told = " and ".join(map(str, sizes))
        raise ValueError(f"The files *.parquet of '{folder}' have vectors of {told} numbers.")
    if len(fingerprints) > 1:
        raise ValueError(f"The files *.parquet of '{folder}' were made by several towers.")
    ids, class_names = _ids_of(labels, folder)
    any_path = any(path is not None for path in paths)
    segment = Segment(torch.cat(rows), ids, paths if any_path else None)
    return ParquetRows(segment, class_names, fingerprints.pop())


def _plain(column: Any) -> Any:
    """The values of a column that are numbered (pandas' categories) or of an extended type."""
    pa = arrow()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _vectors(column: Any, first_row: int) -> Tensor:
    pa, compute = arrow(), arrow(".compute")
    kind = getattr(column.type, "value_type", None) if pa.types.is_nested(column.type) else None
    if kind is None or not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"its column 'vector' must have lists of numbers, got {column.type}")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise ValueError("its column 'vector' has missing values")
    lengths = compute.min_max(compute.list_value_length(column)).as_py()
    if not 0 < lengths["min"] == lengths["max"]:
        raise ValueError(
            f"its column 'vector' has lists of {lengths['min']} to {lengths['max']} numbers, which "
            "must be of one length"
        )
    array = np.array(values.to_numpy(zero_copy_only=False))
    embeddings = torch.from_numpy(array).float().reshape(len(column), -1)
    _checks.check_finite("vector", embeddings, first_row=first_row)
    return embeddings


def _paths(column: Any) -> list[str | None]:
    if not (_is_text(column.type) or arrow().types.is_null(column.type)):
        raise ValueError(f"its column 'path' must have texts, got {column.type}")
    paths: list[str | None] = column.to_pylist()
    return paths


def _labels(column: Any) -> Any:
    """The column as texts or integers of one type; None where it has no label."""
    pa = arrow()
    if column.null_count == len(column):
        return None
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if _is_text(column.type):
        return column.cast(pa.large_string())
    raise ValueError(f"its column 'label' must have texts or integers, got {column.type}")


def _is_text(kind: Any) -> bool:
    types = arrow().types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _ids_of(labels: list[Any], folder: Path) -> tuple[Tensor | None, list[str] | None]:
    """Class ids, and their names where the labels are texts, of all columns."""
    if all(column is None for column in labels):
        return None, None
    present = [column for column in labels if column is not None]
    if len({column.type for column in present}) > 1:
        raise ValueError(f"The labels of '{folder}' must be all texts or all integers, got both.")
    pa, compute = arrow(), arrow(".compute")
    column = pa.chunked_array(present)
    values = column.unique().to_pylist()
    if len(present) < len(labels) or column.null_count or _MISSING & {*values}:
        raise ValueError(
            f"The labels of '{folder}' must be of all rows or of none, and some are missing (null, "
            "an empty text, or -1)."
        )
    if pa.types.is_integer(column.type):
        return torch.from_numpy(column.to_numpy().copy()), None
    names = sorted(values)
    ids = compute.index_in(column, pa.array(names, column.type))
    return torch.from_numpy(ids.to_numpy().astype(np.int64)), names
