"""Tables with a row for each image: CSV, TSV, Parquet, JSON lines, pandas and Arrow."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pairclip.datasets.labels import MISSING, ids_and_names
from pairclip.datasets.rgb import as_rgb
from pairclip.datasets.source import Source

_SUFFIXES = ".csv, .tsv, .parquet, .jsonl or .ndjson, the first two also with .gz after it"
_BOXES = {"x_1", "x_2", "y_1", "y_2"}  # of open-metric-learning


class TableDataset(Dataset[tuple[Image.Image, int]]):
    r"""A table with a row for each image. Needs ``pip install "pairclip[tables]"``.

    Args:
        table: Path of a CSV, TSV, Parquet or JSON lines file, or a pandas or pyarrow table.
        image: Column of the images: paths, encoded images (bytes), or Hugging Face's structs of
            both.
        label: Column of the labels, integers or names; or several, whose values are joined by "/".
            In text files they are integers if each row has one, without leading zeros.
        root: What relative paths start from. None is the folder of the table if the first image
            is there, else the working directory.
        split: Only some rows: a value of the column "split", the name of a column of booleans, or
            a dict from columns to values, such as ``{"fold": 3}``.
        columns: Further columns to keep, for `column`.

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
        columns: Sequence[str] = (),
    ) -> None:
        labels = [label] if isinstance(label, str) else list(label)
        rows = _rows(table, split, text=[image, *labels], columns=columns)
        _check_columns(rows, [image, *labels, *columns])
        if split is not None:
            rows = _split(rows, split)
        elif "split" in rows.column_names:
            values = rows["split"].unique().to_pylist()
            if len(values) > 1:
                warnings.warn(
                    f"The table has a column 'split' with {values[:8]}, and all its rows are "
                    "taken. Choose one with `split=`.",
                    stacklevel=2,
                )
        if set(rows.column_names) >= _BOXES:
            warnings.warn(
                "The table has boxes (x_1, x_2, y_1, y_2); whole images are taken.", stacklevel=2
            )
        if not rows.num_rows:
            raise ValueError(f"The table has no rows for split {split!r}.")
        beside = Path(table).parent if isinstance(table, (str, os.PathLike)) else None
        self.source = TableSource(
            self, rows[image], _labels(rows, labels, is_text=_is_text(table)), root, beside
        )
        self.labels, self.class_names = self.source.labels, self.source.class_names
        self._rows = rows

    def column(self, name: str) -> list[Any] | None:
        """Values of a column that was kept, one for each image; None if there is none such.

        `evaluate` takes its name as `exclude`.
        """
        return self._rows[name].to_pylist() if name in self._rows.column_names else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB and its class id."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}.")
        return as_rgb(self.source.image(index)), int(self.labels[index])


class TableSource(Source):
    """A column of images with their class ids."""

    def __init__(
        self,
        dataset: TableDataset,
        images: Any,
        classes: tuple[Tensor, list[str] | None],
        root: str | os.PathLike[str] | None,
        beside: Path | None,
    ) -> None:
        super().__init__(dataset, *classes)
        self._images = images
        self._root = "" if root is None else os.fspath(root)
        first = self._entry(0)
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
        """A path or an encoded image."""
        entry = self._entry(index)
        if entry is None:
            raise ValueError("there is no image in the row.")
        return os.path.join(self._root, entry) if isinstance(entry, str) else entry

    def path(self, index: int) -> str | None:
        """The path, unless the table has the image itself."""
        image = self._entry(index)
        return os.path.join(self._root, image) if isinstance(image, str) else None

    def identity(self, index: int) -> bytes | None:
        """The encoded image, or what tells its file."""
        entry = self._entry(index)
        return entry if isinstance(entry, bytes) else super().identity(index)


def _arrow(module: str = "") -> Any:
    try:
        return importlib.import_module("pyarrow" + module)
    except ImportError as error:
        raise ImportError(
            'Tables are read by pyarrow: `pip install "pairclip[tables]"`.'
        ) from error


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _is_text(table: Any) -> bool:
    return isinstance(table, (str, os.PathLike)) and _suffix(Path(table)) in (".csv", ".tsv")


def _rows(table: Any, split: Any, text: list[str], columns: Sequence[str]) -> Any:
    """The table in Arrow's form, of a file only the columns that are needed."""
    pa = _arrow()
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
    suffix = _suffix(path)
    wanted = [
        *text,
        *columns,
        "split",
        *_BOXES,
        *([split] if isinstance(split, str) else split or ()),
    ]
    if suffix in (".csv", ".tsv"):
        return _read_text(path, "," if suffix == ".csv" else "\t", text, wanted)
    if suffix in (".parquet", ".pq"):
        parquet = _arrow(".parquet")
        there = parquet.read_schema(path).names
        return parquet.read_table(path, columns=[name for name in there if name in wanted])
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _arrow(".json").read_json(path)
    raise ValueError(f"`table` must be a file {_SUFFIXES}, got '{path.name}'.")


def _read_text(path: Path, delimiter: str, text: list[str], wanted: list[str]) -> Any:
    pa, csv = _arrow(), _arrow(".csv")
    parse = csv.ParseOptions(delimiter=delimiter)
    with csv.open_csv(path, parse_options=parse) as reader:
        there = reader.schema.names
    _check_names(there, text)
    convert = csv.ConvertOptions(
        include_columns=[name for name in there if name in wanted],
        column_types={name: pa.string() for name in text},  # else '007' is read as 7
        null_values=[""],  # not "NA", which may be a name
        strings_can_be_null=True,
    )
    return csv.read_csv(path, parse_options=parse, convert_options=convert)


def _from_pandas(pa: Any, table: Any, text: list[str]) -> Any:
    _check_names(list(table.columns), text)
    table = table.copy(deep=False)
    image, *labels = text
    if len(table) and isinstance(table[image].iloc[0], os.PathLike):
        table[image] = table[image].map(os.fspath)
    try:
        return pa.Table.from_pandas(table, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        for name in labels:
            ids_and_names(table[name], len(table))  # says it in words, if it is a label
        table = table[[name for name in table.columns if name in {*text, "split"}]]
        return pa.Table.from_pandas(table, preserve_index=False)


def _check_names(there: list[Any], wanted: list[str]) -> None:
    for name in wanted:
        if name not in there:
            raise ValueError(f"The table has no column {name!r}, but {list(there)}.")


def _check_columns(rows: Any, wanted: list[str]) -> None:
    _check_names(rows.column_names, wanted)


def _split(rows: Any, split: str | Mapping[str, Any]) -> Any:
    """The rows of a split."""
    pa, compute = _arrow(), _arrow(".compute")
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
    _check_names(rows.column_names, list(split))
    for name, value in split.items():
        column = rows[name]
        if pa.types.is_boolean(column.type):
            equal = compute.equal(column, bool(value))
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            equal = compute.equal(compute.cast(column, pa.float64()), float(value))
        else:
            equal = compute.equal(compute.cast(column, pa.string()), str(value))
        rows = rows.filter(equal)
    return rows


def _labels(rows: Any, names: list[str], *, is_text: bool) -> tuple[Tensor, list[str] | None]:
    pa, compute = _arrow(), _arrow(".compute")
    column = rows[names[0]]
    if len(names) > 1:
        parts = [compute.cast(rows[name], pa.string()) for name in names]
        column = compute.binary_join_element_wise(*parts, "/")
    if pa.types.is_dictionary(column.type):
        column = compute.cast(column, column.type.value_type)
    is_string = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text and is_string and len(names) == 1:
        numbers = compute.match_substring_regex(column, r"^(0|-?[1-9][0-9]{0,17})$")
        if compute.all(numbers).as_py() and column.null_count < len(column):
            column, is_string = compute.cast(column, pa.int64()), False
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        ids = compute.fill_null(compute.cast(column, pa.int64()), MISSING).to_numpy()
        return torch.from_numpy(np.array(ids)), None
    if pa.types.is_temporal(column.type) or pa.types.is_decimal(column.type):
        column, is_string = compute.cast(column, pa.string()), True
    if not is_string:
        return ids_and_names(column.to_pylist(), len(column))
    # Of each name once, not of each row, as NumPy would do it.
    encoded = column.combine_chunks().dictionary_encode()
    unique = encoded.dictionary.to_pylist()
    ordered = sorted(name for name in unique if name)
    id_of = {name: id_ for id_, name in enumerate(ordered)}
    ids_of_unique = np.array([*(id_of.get(name, MISSING) for name in unique), MISSING])
    indices = compute.fill_null(encoded.indices, len(unique)).to_numpy(zero_copy_only=False)
    return torch.from_numpy(ids_of_unique[indices]), ordered
