"""Tensors in files of the safetensors format: written piece by piece; mapped, not read.

The library of that name does the first for tensors that are all in memory, and opens no path that
isn't UTF-8. It reads what is written here, and the other way round.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from pairclip._files.contents import check_is_file, named

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; as the library has it


class Entry(NamedTuple):
    """Kind and shape of a tensor, and from where to where its bytes lie behind the header."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    end: int


class Header(NamedTuple):
    """The tensors of a file by name, in the order in which they lie; its size, all included."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, of any device and layout, into an open file."""
    # The widest elements first: so each tensor lies where its elements may.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    write_header(file, {n: (tensors[n].dtype, tensors[n].shape) for n in ordered}, metadata)
    for name in ordered:
        file.write(bytes_of(tensors[name]))


def write_header(
    file: BinaryIO,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write what comes before the bytes of the tensors, which follow in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in _NAMES:
            raise TypeError(f"A tensor of {dtype} can't be written to a file.")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = {"data_offsets": [start, end]}
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), **offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of a file, mapped into memory and not to be written to.

    Attributes:
        metadata: What was written beside the tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
        OSError: If it can't be read.
    """

    def __init__(self, path: Path) -> None:
        check_is_file(path)
        with named(path), path.open("rb") as file:
            try:
                header = read_header(file, path.stat().st_size)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"'{path}' is damaged: {error}.") from error
            # Copy on write: torch wants memory that it could write to.
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.metadata = header.metadata
        self._tensors = {
            name: self._view(entry, header.size) for name, entry in header.entries.items()
        }

    def _view(self, entry: Entry, start: int) -> Tensor:
        values = self._bytes[start + entry.start : start + entry.end]
        if int(values.storage_offset()) % entry.dtype.itemsize:
            values = values.clone()  # another program's file, where elements lie anywhere
        return values.view(entry.dtype).reshape(entry.shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def release(self, rows: Tensor) -> None:
        """Let the system have the memory of some rows back; the file still has them."""
        if hasattr(self._memory, "madvise"):
            start = rows.data_ptr() - self._bytes.data_ptr()
            first_page = start // mmap.PAGESIZE * mmap.PAGESIZE
            length = start + int(rows.nbytes) - first_page
            self._memory.madvise(mmap.MADV_DONTNEED, first_page, length)


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor on any device, row after row; its own memory where possible."""
    # NumPy has no bfloat16, but bytes are bytes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def header_length(first: bytes, most: int = LONGEST_HEADER) -> int:
    """Bytes of JSON after the first eight of a file; a ValueError if there can't be so many."""
    length = int.from_bytes(first, "little")
    if not 2 <= length <= most:
        raise ValueError("it has no header of a safetensors file")
    return length


def read_header(file: BinaryIO, size: int | None = None) -> Header:
    """What a file says of its tensors; a ValueError says what is wrong.

    Args:
        file: At its beginning. No more than the header is read.
        size: Bytes of the whole file, None if nobody knows.
    """
    most = LONGEST_HEADER if size is None else min(size - 8, LONGEST_HEADER)
    length = header_length(file.read(8), most)
    layout = json.loads(file.read(length))
    if not isinstance(layout, dict):
        raise ValueError("its header is not one of a safetensors file")
    metadata = layout.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("its metadata are not texts")
    entries: dict[str, Entry] = {}
    ends = 0
    for name, entry in sorted(layout.items(), key=_offsets):
        shape, (start, end) = entry.get("shape"), _offsets((name, entry))
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise ValueError(f"the tensor {name!r} is of an unknown kind")
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise ValueError(f"the tensor {name!r} has no shape")
        if start != ends or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the tensor {name!r} is not where it should be")
        ends = end
        entries[name] = Entry(dtype, shape, start, end)
    if size is not None and 8 + length + ends != size:
        raise ValueError(f"it has {size} bytes instead of {8 + length + ends}")
    return Header(entries, metadata, 8 + length)


def _offsets(item: tuple[str, Any]) -> tuple[int, int]:
    name, entry = item
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and [type(n) for n in offsets] == [int, int]):
        raise ValueError(f"the tensor {name!r} has no place")
    return offsets[0], offsets[1]
