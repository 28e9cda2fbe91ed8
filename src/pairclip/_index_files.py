"""The folder of an index: tensors in safetensors, everything else in JSON.

The JSON names the tensors' file, which has a new name each time. So putting the JSON in place is
the one step from the old index to the new.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pairclip import _files

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
    old, new = _tensors_file_in(folder), f"image_index-{uuid.uuid4().hex}.safetensors"
    header = {"format": _FORMAT, "version": _VERSION, **description}
    try:
        header["tensors"] = _write_tensors(folder / new, tensors)
        header["sha256"] = _checksum(header)
        _files.write_text(folder / HEADER, json.dumps(header))
    finally:
        # Whichever way it went, and wherever it was interrupted, the JSON says what is in use.
        for name in {old, new} - {_tensors_file_in(folder), None}:
            (folder / str(name)).unlink(missing_ok=True)
    _files.flush(folder)
    return header


class MappedRows:
    """A matrix in a file, mapped into memory."""

    def __init__(self, path: Path, offset: int, shape: list[int], dtype: torch.dtype) -> None:
        with path.open("rb") as file:
            # Copy on write: torch wants memory that it could write to.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._offset = offset
        count = math.prod(shape)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)
        self.rows = flat.reshape(shape)

    def release(self, rows: Tensor) -> None:
        """Let the system have the memory of some of the rows back; the file still has them."""
        if hasattr(self._memory, "madvise"):
            start = self._offset + int(rows.storage_offset()) * rows.itemsize
            first_page = start // mmap.PAGESIZE * mmap.PAGESIZE
            length = start + int(rows.nbytes) - first_page
            self._memory.madvise(mmap.MADV_DONTNEED, first_page, length)


def read_index(folder: Path) -> tuple[Header, MappedRows, Tensor | None]:
    """Header, memory-mapped embeddings and labels, checked against each other."""
    header = read_header(folder)
    path = folder / header["tensors"]["file"]
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing, and the index's embeddings are in it.")
    if path.stat().st_size != header["tensors"]["bytes"]:
        raise ValueError(
            f"'{path}' is damaged: it has {path.stat().st_size} bytes instead of "
            f"{header['tensors']['bytes']}."
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            found = {name: (s.get_shape(), s.get_dtype()) for name, s in slices.items()}
            labels = file.get_tensor("labels") if "labels" in found else None
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged: {error}.") from error
    shape, dtype = [header["num_images"], header["embedding_dim"]], DTYPES[header["dtype"]]
    expected = {"embeddings": (shape, "F16" if dtype == torch.float16 else "F32")}
    if header["has_labels"]:
        expected["labels"] = (shape[:1], "I64")
    if found != expected:
        raise ValueError(f"'{path}' is damaged: its tensors are not those that {HEADER} tells of.")
    return header, MappedRows(path, _offset_of("embeddings", path), shape, dtype), labels


def read_header(folder: Path) -> Header:
    """The JSON of an index, each of its fields of the right kind."""
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(
            f"`folder` '{folder}' has no {HEADER}, so no index was saved there."
        )
    try:
        header = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged: it is not valid JSON ({error}).") from error
    if not (isinstance(header, dict) and header.get("format") == _FORMAT):
        raise ValueError(f"'{path}' is no index of pairclip. Choose the folder of a saved one.")
    version = header.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise ValueError(
            f"'{path}' has format version {version}, and this version of pairclip reads up to "
            f"{_VERSION}. Update pairclip."
        )
    for field, is_valid in _FIELDS.items():
        if field not in header or not is_valid(header[field], header):
            raise ValueError(f"'{path}' is damaged: its field {field!r} is missing or wrong.")
    return header


def verify_index(folder: Path, header: Header) -> None:
    """Raise unless the folder still has the index with this header, whole."""
    found = read_header(folder)
    if found["sha256"] != _checksum(found):
        raise ValueError(f"'{folder / HEADER}' is damaged: its checksum differs.")
    if found["sha256"] != header["sha256"]:
        raise ValueError(f"The index in '{folder}' is another one by now. Load it again.")
    path = folder / header["tensors"]["file"]
    if _files.sha256_of(path) != header["tensors"]["sha256"]:
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


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Header:
    _files.write_tensors(path, tensors)
    size = path.stat().st_size
    return {"file": path.name, "bytes": size, "sha256": _files.sha256_of(path)}


def _offset_of(tensor: str, path: Path) -> int:
    """Where a tensor starts in a safetensors file, by that format's own header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        start: int = json.loads(file.read(size))[tensor]["data_offsets"][0]
    return 8 + size + start


def _checksum(header: Header) -> str:
    """SHA-256 of a header without its own checksum, however its JSON is laid out."""
    content = {field: value for field, value in header.items() if field != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
