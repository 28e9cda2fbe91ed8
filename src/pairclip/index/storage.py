"""The folder of an index: tensors in safetensors, everything else in JSON.

The JSON names the tensors' file, which has a new name each time. So putting the JSON in place is
the one step from the old index to the new.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairclip import _files
from pairclip._files import MappedTensors, write_tensors

HEADER = "image_index.json"
_FORMAT, _VERSION = "pairclip.ImageIndex", 1
_TENSORS_FILE = re.compile(r"image_index-[0-9a-f]{32}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
DTYPES = {"float16": torch.float16, "float32": torch.float32}

Header = dict[str, Any]


def write_index(folder: Path, tensors: Mapping[str, Tensor], description: Header) -> Header:
    """Write an index into a folder, over the one that is there; returns its header."""
    if folder.is_file():
        raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
    folder.mkdir(parents=True, exist_ok=True)
    old, new = _tensors_file_in(folder), folder / f"image_index-{uuid.uuid4().hex}.safetensors"
    header = {"format": _FORMAT, "version": _VERSION, **description}
    try:
        with _files.whole_file(new) as file:
            write_tensors(file, tensors)
        size = new.stat().st_size
        header["tensors"] = {"file": new.name, "bytes": size, "sha256": _files.checksum(new)}
        header["sha256"] = _files.checksum_of_fields(header)
        _files.write_json(folder / HEADER, header)
    finally:
        # Whichever way it went, and wherever it was interrupted, the JSON says what is in use.
        for name in {old, new.name} - {_tensors_file_in(folder), None}:
            (folder / str(name)).unlink(missing_ok=True)
    _files.flush(folder)
    return header


def read_index(folder: Path) -> tuple[Header, MappedTensors]:
    """Header, and memory-mapped embeddings and labels, checked against each other."""
    header = read_header(folder)
    path = folder / header["tensors"]["file"]
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing, and the index's embeddings are in it.")
    if path.stat().st_size != header["tensors"]["bytes"]:
        raise ValueError(
            f"'{path}' is damaged: it has {path.stat().st_size} bytes instead of "
            f"{header['tensors']['bytes']}."
        )
    tensors = MappedTensors(path)
    shape = [header["num_images"], header["embedding_dim"]]
    expected = {"embeddings": (shape, DTYPES[header["dtype"]])}
    if header["has_labels"]:
        expected["labels"] = (shape[:1], torch.int64)
    if {name: (list(t.shape), t.dtype) for name, t in tensors.items()} != expected:
        raise ValueError(f"'{path}' is damaged: its tensors are not those that {HEADER} tells of.")
    return header, tensors


def read_header(folder: Path) -> Header:
    """The JSON of an index, each of its fields of the right kind."""
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(
            f"`folder` '{folder}' has no {HEADER}, so no index was saved there."
        )
    header = _files.read_json(path)
    if not (isinstance(header, dict) and header.get("format") == _FORMAT):
        raise ValueError(f"'{path}' is no index of pairclip. Choose the folder of a saved one.")
    _files.check_format(header.get("version"), _VERSION, f"'{path}'")
    for field, is_valid in _FIELDS.items():
        if field not in header or not is_valid(header[field], header):
            raise ValueError(f"'{path}' is damaged: its field {field!r} is missing or wrong.")
    return header


def verify_index(folder: Path, header: Header) -> None:
    """Raise unless the folder still has the index with this header, whole."""
    found = read_header(folder)
    if found["sha256"] != _files.checksum_of_fields(found):
        raise ValueError(f"'{folder / HEADER}' is damaged: its checksum differs.")
    if found["sha256"] != header["sha256"]:
        raise ValueError(f"The index in '{folder}' is another one by now. Load it again.")
    path = folder / header["tensors"]["file"]
    if _files.checksum(path) != header["tensors"]["sha256"]:
        raise ValueError(f"'{path}' is damaged: its checksum differs.")


def _is_count(value: Any, header: Header) -> bool:
    return type(value) is int and value > 0


def _is_text(value: Any, header: Header) -> bool:
    return isinstance(value, str)


def _is_list_of_names(value: Any, header: Header) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _are_paths(value: Any, header: Header) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == header["num_images"]
        and all(path is None or isinstance(path, str) for path in value)
    )


def _is_file_entry(value: Any, header: Header) -> bool:
    # A name of the one form that is written never leads out of the folder.
    return (
        isinstance(value, dict)
        and _TENSORS_FILE.fullmatch(str(value.get("file"))) is not None
        and _SHA256.fullmatch(str(value.get("sha256"))) is not None
        and _is_count(value.get("bytes"), header)
    )


_FIELDS = {
    "version": _is_count,
    "fingerprint": _is_text,
    "num_images": _is_count,
    "embedding_dim": _is_count,
    "dtype": lambda value, header: isinstance(value, str) and value in DTYPES,
    "has_labels": lambda value, header: isinstance(value, bool),
    "class_names": _is_list_of_names,
    "paths": _are_paths,
    "tensors": _is_file_entry,
    "sha256": _is_text,
}


def _tensors_file_in(folder: Path) -> str | None:
    """Name of the tensors' file of the index in a folder, if there is a readable one."""
    try:
        return str(read_header(folder)["tensors"]["file"])
    except (FileNotFoundError, ValueError):
        return None
