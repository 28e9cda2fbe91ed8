"""The folder of an index: a file of tensors for each segment, everything else in JSON.

The JSON names the files, and each has a new name. So putting the JSON in place is the one step from
the old index to the new, and adding images writes these images alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairclip import _files
from pairclip.index.segments import Segment, StoredPaths, checked_paths

HEADER = "image_index.json"
_FORMAT, _VERSION = "pairclip.ImageIndex", 2
_FILE = re.compile(r"image_index-[0-9a-f]{32}\.safetensors")
_LEFTOVERS = r"\.image_index.*\.[0-9a-f]{32}"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WAITED_SECONDS = 600
DTYPES = {"float16": torch.float16, "float32": torch.float32}

Header = dict[str, Any]


def write_index(
    folder: Path, segments: Sequence[Segment], fields: Header, saved: Header | None
) -> tuple[Header, list[Segment]]:
    """Write an index into a folder, over the one that is there.

    Args:
        folder: Made if it is missing.
        segments: Of the index; what is in a file of `saved` already is not written again.
        fields: What the header says beside them.
        saved: The header with which these segments were last written here or read from here.

    Returns:
        The new header, and the segments as they are in the files.
    """
    if folder.is_file():
        raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
    folder.mkdir(parents=True, exist_ok=True)
    held = "is being written to by another process, for more than ten minutes now."
    with _files.locked(folder, held, seconds=_WAITED_SECONDS):
        _remove_unused(folder)
        current = _current(folder)
        same = saved is not None and current is not None and current["sha256"] == saved["sha256"]
        try:
            written = [_written(folder, group, same) for group in _groups(segments, same)]
            header = _files.sealed(
                {"format": _FORMAT, "version": _VERSION, **fields}
                | {"num_images": sum(map(len, written)), "segments": list(map(_entry, written))}
            )
            _files.write_json(folder / HEADER, header)
        finally:
            _remove_unused(folder)
    return header, written


def read_index(folder: Path) -> tuple[Header, list[Segment]]:
    """Header and segments, their embeddings mapped, checked against each other."""
    while True:
        header = read_header(folder)
        try:
            return header, [_segment(folder, header, entry) for entry in _entries(header)]
        except FileNotFoundError:
            # Written anew meanwhile, or truly missing.
            if read_header(folder)["sha256"] == header["sha256"]:
                raise


def read_header(folder: Path) -> Header:
    """The JSON of an index, each of its fields of the right kind."""
    path = folder / HEADER
    if not path.exists():
        raise FileNotFoundError(
            f"`folder` '{folder}' has no {HEADER}, so no index was saved there."
        )
    header = _files.read_json(path)
    if not (isinstance(header, dict) and header.get("format") == _FORMAT):
        raise ValueError(f"'{path}' is no index of pairclip. Choose the folder of a saved one.")
    _files.check_seal(header, path)
    _files.check_format(header.get("version"), _VERSION, f"'{path}'")
    for field, is_valid in (_FIELDS | (_FIRST if header.get("version") == 1 else _SECOND)).items():
        if field not in header or not is_valid(header[field]):
            raise ValueError(f"'{path}' is damaged: its field {field!r} is missing or wrong.")
    return header


def verify_index(folder: Path, header: Header) -> None:
    """Raise unless the folder still has the index with this header, whole."""
    _check_same(folder, header)
    for entry in _entries(header):
        path = folder / entry["file"]
        try:
            if _files.checksum(path) != entry["sha256"]:
                raise ValueError(f"'{path}' is damaged: its checksum differs.")
        except FileNotFoundError:
            _check_same(folder, header)
            raise


def _check_same(folder: Path, header: Header) -> None:
    if read_header(folder)["sha256"] != header["sha256"]:
        raise ValueError(f"The index in '{folder}' is another one by now. Load it again.")


def _groups(segments: Sequence[Segment], same: bool) -> list[list[Segment]]:
    """Segments that go into one file each; of a file that stays, one that has its entry."""
    if not same:
        return [list(segments)]
    groups: list[list[Segment]] = []
    for segment in segments:
        groups.append([segment])
        # What is written anew takes small ones before it along, so that they stay few.
        while (
            len(groups) > 1
            and not _stays(groups[-1])
            and _size(groups[-2]) <= 2 * _size(groups[-1])
        ):
            last = groups.pop()
            groups[-1] += last
    return groups


def _stays(group: list[Segment]) -> bool:
    """Whether its file is as good as a new one: there, and most of its rows are in use."""
    return (
        len(group) == 1 and group[0].entry is not None and 2 * len(group[0]) >= len(group[0].rows)
    )


def _size(group: list[Segment]) -> int:
    return sum(map(len, group))


def _written(folder: Path, group: list[Segment], same: bool) -> Segment:
    """The group as one segment that is in a file."""
    first = group[0]
    if same and _stays(group):
        return first
    path = folder / f"image_index-{uuid.uuid4().hex}.safetensors"
    count = _size(group)
    details: dict[str, Tensor] = {}
    if first.labels is not None:
        labels = [segment.kept(segment.labels) for segment in group if segment.labels is not None]
        details["labels"] = torch.cat(labels)
    paths: list[str | None] | None = None
    if any(segment.paths is not None for segment in group):
        paths = [path for segment in group for path in segment.kept_paths()]
        text = json.dumps(paths).encode()
        details["paths"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = (first.rows.dtype, (count, first.rows.shape[1]))
    layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {
        # The widest elements first, so that each lies where its elements may.
        name: (details[name].dtype, details[name].shape) if name in details else rows
        for name in ("labels", "embeddings", "paths")
        if name in {"embeddings", *details}
    }
    with _files.whole_file(path) as file:
        _files.write_header(file, layout)
        for name in layout:
            pieces = [details[name]] if name in details else (s.kept(s.rows) for s in group)
            for piece in pieces:
                file.write(_files.bytes_of(piece))
    entry = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": _files.checksum(path),
        "details_sha256": _checksum_of(details),
        "num_rows": count,
    }
    if len(group) == 1 and first.left is None:
        return Segment(first.rows, first.labels, first.paths, first.mapped, entry)
    mapped = _files.MappedTensors(path)
    return Segment(mapped["embeddings"], details.get("labels"), paths, mapped, entry)


def _entry(segment: Segment) -> Header:
    removed: list[int] = []
    if segment.left is not None:
        gone = torch.ones(len(segment.rows), dtype=torch.bool, device="cpu")
        gone[segment.left] = False
        removed = gone.nonzero()[:, 0].tolist()
    return {**(segment.entry or {}), "removed": removed}


def _entries(header: Header) -> list[Header]:
    if header["version"] == 1:
        return [{**header["tensors"], "num_rows": header["num_images"], "removed": []}]
    entries: list[Header] = header["segments"]
    return entries


def _segment(folder: Path, header: Header, entry: Header) -> Segment:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"'{path}' is damaged: it has {size} bytes, not {entry['bytes']}.")
        tensors = _files.MappedTensors(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' is missing, and embeddings are in it.") from error
    expected = {"embeddings": ([entry["num_rows"], header["embedding_dim"]], header["dtype"])}
    if header["has_labels"]:
        expected["labels"] = ([entry["num_rows"]], "int64")
    shapes = {
        name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
        if name != "paths"
    }
    if shapes != expected:
        raise ValueError(f"'{path}' is damaged: its tensors are not those that {HEADER} tells of.")
    details = {name: tensors[name] for name in ("labels", "paths") if name in tensors}
    if "details_sha256" in entry and _checksum_of(details) != entry["details_sha256"]:
        raise ValueError(f"'{path}' is damaged: the checksum of its labels and paths differs.")
    paths: Sequence[str | None] | None = None
    if "paths" in details:
        paths = StoredPaths(details["paths"], entry["num_rows"], path)
    elif header["version"] == 1 and header["paths"] is not None:
        paths = checked_paths(header["paths"], entry["num_rows"], folder / HEADER)
    left = None
    if entry["removed"]:
        stay = torch.ones(entry["num_rows"], dtype=torch.bool, device="cpu")
        stay[torch.tensor(entry["removed"], dtype=torch.int64, device="cpu")] = False
        left = stay.nonzero()[:, 0]
    return Segment(
        tensors["embeddings"],
        details["labels"].clone() if "labels" in details else None,
        paths,
        tensors,
        # A file of the first format has no paths, so it is written anew.
        entry if header["version"] == _VERSION else None,
        left,
    )


def _checksum_of(details: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(details):
        digest.update(_files.bytes_of(details[name]))
    return digest.hexdigest()


def _current(folder: Path) -> Header | None:
    """The header of the index in a folder, if there is a readable one."""
    with suppress(FileNotFoundError, ValueError):
        return read_header(folder)
    return None


def _remove_unused(folder: Path) -> None:
    """Remove files that no header mentions: whoever holds the lock has no use for them."""
    current = _current(folder)
    used = {entry["file"] for entry in _entries(current)} if current else set()
    if current is None and (folder / HEADER).exists():
        return  # damaged, or of a newer version, so its files may be of use
    for path in folder.iterdir():
        if _FILE.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)
    _files.remove_leftovers(folder, _LEFTOVERS)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def is_list_of(*kinds: type) -> Callable[[Any], bool]:
    """Says of a value whether it is a list of nothing else."""
    return lambda value: isinstance(value, list) and set(map(type, value)) <= {*kinds}


def _is_file_entry(value: Any) -> bool:
    # A name of the one form that is written never leads out of the folder.
    return (
        isinstance(value, dict)
        and _FILE.fullmatch(str(value.get("file"))) is not None
        and _SHA256.fullmatch(str(value.get("sha256"))) is not None
        and _is_count(value.get("bytes"))
    )


def _is_segment(value: Any) -> bool:
    if not (_is_file_entry(value) and _is_count(value.get("num_rows"))):
        return False
    removed, rows = value.get("removed"), value["num_rows"]
    return (
        _SHA256.fullmatch(str(value.get("details_sha256"))) is not None
        and is_list_of(int)(removed)
        and min(removed, default=0) >= 0
        and max(removed, default=0) < rows
        and len(set(removed)) < rows
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "version": _is_count,
    "fingerprint": lambda value: isinstance(value, str),
    "num_images": _is_count,
    "embedding_dim": _is_count,
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "has_labels": lambda value: isinstance(value, bool),
    "class_names": lambda value: value is None or is_list_of(str)(value),
}
_FIRST: dict[str, Callable[[Any], bool]] = {
    "tensors": _is_file_entry,
    "paths": lambda value: value is None or isinstance(value, list),
}
_SECOND: dict[str, Callable[[Any], bool]] = {
    "segments": lambda value: (
        isinstance(value, list) and bool(value) and all(map(_is_segment, value))
    )
}
