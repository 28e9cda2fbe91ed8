"""What a table holds, in Arrow's form: its rows, those of a split, and its classes."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairclip.datasets.labels import MISSING, ids_and_names

_SUFFIXES = ".csv, .tsv, .parquet, .jsonl or .ndjson, the first two also with .gz after it"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
BOXES = ("x_1", "y_1", "x_2", "y_2")  # of open-metric-learning


def arrow(module: str = "") -> Any:
    """A module of pyarrow."""
    try:
        return importlib.import_module("pyarrow" + module)
    except ImportError as error:
        raise ImportError(
            'Tables are read by pyarrow: `pip install "pairclip[tables]"`.'
        ) from error


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def is_text_file(table: Any) -> bool:
    """Whether its values have no types."""
    return isinstance(table, (str, os.PathLike)) and _suffix(Path(table)) in (".csv", ".tsv")


def rows_of(table: Any, split: Any, text: list[str]) -> Any:
    """The table in Arrow's form, of a file only the columns that are needed."""
    pa = arrow()
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "to_arrow"):  # polars
        return table.to_arrow()
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        return _from_pandas(pa, table, text)
    if not isinstance(table, (str, os.PathLike)):
        raise TypeError(
            f"`table` must be a path, or a table of pandas or pyarrow, got {type(table).__name__}."
        )
    path = Path(table)
    if not path.exists():
        raise FileNotFoundError(f"`table` must be a file, got '{path}'.")
    try:
        return _read_file(path, split, text)
    except arrow().ArrowInvalid as error:
        raise ValueError(
            f"`table` '{path}' can't be read: {error}. Text must be UTF-8, with a row of column "
            "names first."
        ) from error


def _read_file(path: Path, split: Any, text: list[str]) -> Any:
    suffix = _suffix(path)
    wanted = [*text, "split", *BOXES, *([split] if isinstance(split, str) else split or ())]
    if suffix in (".csv", ".tsv"):
        return _read_text(path, "," if suffix == ".csv" else "\t", text, wanted)
    if suffix in (".parquet", ".pq"):
        parquet = arrow(".parquet")
        there = parquet.read_schema(path).names
        return parquet.read_table(path, columns=[name for name in there if name in wanted])
    if suffix in (".jsonl", ".ndjson", ".json"):
        return arrow(".json").read_json(path)
    raise ValueError(f"`table` must be a file {_SUFFIXES}, got '{path.name}'.")


def _read_text(path: Path, delimiter: str, text: list[str], wanted: list[str]) -> Any:
    pa, csv = arrow(), arrow(".csv")
    parse = csv.ParseOptions(delimiter=delimiter)
    with csv.open_csv(path, parse_options=parse) as reader:
        there = reader.schema.names
    check_names(there, text)
    image, *labels = text
    names = pa.dictionary(pa.int32(), pa.string())  # each once, not in every row
    convert = csv.ConvertOptions(
        include_columns=[name for name in there if name in wanted],
        column_types={image: pa.string()} | dict.fromkeys(labels, names),  # else '007' becomes 7
        null_values=[""],  # not "NA", which may be a name
        strings_can_be_null=True,
    )
    return csv.read_csv(path, parse_options=parse, convert_options=convert)


def _from_pandas(pa: Any, table: Any, text: list[str]) -> Any:
    check_names(list(table.columns), text)
    table = table.copy(deep=False)
    image, *labels = text
    if table[image].map(lambda value: isinstance(value, os.PathLike)).any():
        table[image] = table[image].map(os.fspath, na_action="ignore")
    try:
        return pa.Table.from_pandas(table, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        for name in labels:
            ids_and_names(table[name], len(table))  # says it in words, if it is a label
        table = table[[name for name in table.columns if name in {*text, "split"}]]
        return pa.Table.from_pandas(table, preserve_index=False)


def check_names(there: list[Any], wanted: list[str]) -> None:
    """Raise unless the columns are there."""
    for name in wanted:
        if name not in there:
            raise ValueError(f"The table has no column {name!r}, but {list(there)}.")


def rows_of_split(rows: Any, split: str | Mapping[str, Any]) -> Any:
    """The rows of a split."""
    pa, compute = arrow(), arrow(".compute")
    if isinstance(split, str):
        values = rows["split"].unique().to_pylist() if "split" in rows.column_names else []
        if split in values:
            split = {"split": split}
        elif split in rows.column_names and pa.types.is_boolean(rows[split].type):
            split = {split: True}
        else:
            raise ValueError(
                f"`split` must be one of {values[:8]} in a column 'split', a column of booleans, "
                f"or a dict from columns to values, got {split!r}."
            )
    check_names(rows.column_names, list(split))
    for name, value in split.items():
        column = rows[name]
        if pa.types.is_boolean(column.type):
            equal = compute.equal(column, bool(value))
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            if not isinstance(value, Real):
                raise TypeError(
                    f"`split` must give a number for the column {name!r} of {column.type}, got "
                    f"{value!r}."
                )
            equal = compute.equal(compute.cast(column, pa.float64()), float(value))
        else:
            equal = compute.equal(compute.cast(column, pa.string()), str(value))
        rows = rows.filter(equal)
    return rows


def classes_of(rows: Any, labels: list[str], *, is_text: bool) -> tuple[Tensor, list[str] | None]:
    """Class id of each row, `MISSING` where there is none, and the names of classes."""
    pa, compute = arrow(), arrow(".compute")
    column = rows[labels[0]]
    if len(labels) > 1:
        parts = [compute.cast(rows[label], pa.string()) for label in labels]
        column = compute.binary_join_element_wise(*parts, "/")
    if pa.types.is_dictionary(column.type) and not _is_string(pa, column.type.value_type):
        column = compute.cast(column, column.type.value_type)
    if pa.types.is_temporal(column.type) or pa.types.is_decimal(column.type):
        column = compute.cast(column, pa.string())
    if pa.types.is_floating(column.type):
        # Integers with gaps are floats in pandas, and stay so in a split that has no gap.
        there = compute.if_else(compute.is_nan(column), None, column)
        with suppress(pa.lib.ArrowException):
            column = compute.cast(there, pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        ids = compute.fill_null(compute.cast(column, pa.int64()), MISSING).to_numpy()
        return torch.from_numpy(np.array(ids)), None
    if _is_string(pa, column.type):
        column = column.dictionary_encode()
    if not pa.types.is_dictionary(column.type):
        return ids_and_names(column.to_pylist(), len(column))
    # Of each name once, not of each row, as NumPy would do it.
    encoded = column.unify_dictionaries().combine_chunks()
    unique = encoded.dictionary.to_pylist()
    slots = compute.fill_null(encoded.indices, len(unique)).to_numpy(zero_copy_only=False)
    there = np.bincount(slots, minlength=len(unique) + 1)[:-1]
    names = sorted(name for name, count in zip(unique, there, strict=True) if name and count)
    if is_text and len(labels) == 1 and names and all(map(_INTEGER.fullmatch, names)):
        id_of, class_names = {name: int(name) for name in names}, None
    else:
        id_of, class_names = {name: id_ for id_, name in enumerate(names)}, names
    ids = np.array([*(id_of.get(name, MISSING) for name in unique), MISSING])
    return torch.from_numpy(ids[slots]), class_names


def _is_string(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
