"""The tensors of the image tower alone, out of a file of safetensors on the hub, by ranges."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from pairclip._files import whole_file

VARIANT = "image_tower"  # what `transformers` calls other weights of one model: "fp16", say
PART, WHOLE = f"model.{VARIANT}.safetensors", "model.safetensors"


class _NoRangesError(Exception):
    """A server sends more than it was asked for."""


class _Piece:
    """Takes what a range brings, and no more."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.most, self.size = file, most, 0

    def write(self, content: bytes) -> int:
        self.size += len(content)
        if self.size > self.most:
            raise _NoRangesError
        return self.file.write(content)

    def tell(self) -> int:
        return self.size

    def seek(self, *_: int) -> int:
        raise _NoRangesError  # asked for where a broken range begins at the first byte again


def fetch_part(name: str, folder: Path, prefixes: tuple[str, ...]) -> bool:
    """Put some tensors of a repository's one file of weights into the snapshot of a commit.

    The file has a name of its own there, so that no one takes it for the whole model.

    Args:
        name: Id of the repository.
        folder: The snapshot, named as the commit.
        prefixes: What the names of the tensors begin with.

    Returns:
        Whether it is there; not so where the server gives no ranges.
    """
    url = hf_hub_url(name, WHOLE, revision=folder.name)
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / folder.parents[1].name
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{folder.name}.{VARIANT}.lock"):
        if (folder / PART).is_file():
            return True
        try:
            entries, start, total = _header(url)
            wanted = [entry for entry in entries if entry[0].startswith(prefixes)]
            with whole_file(folder / PART) as file:
                _write_header(file, wanted)
                for first, end in _runs(wanted):
                    _get(url, file, start + first, end - first)
        except _NoRangesError:
            return False
    size = (folder / PART).stat().st_size
    print(
        f"'{name}': fetched its image tower, {size / 1e6:,.1f} MB of {total / 1e6:,.1f}.",
        file=sys.stderr,
    )
    return True


def _get(url: str, file: BinaryIO, start: int, size: int) -> None:
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + size - 1}"}
    piece: Any = _Piece(file, size)
    http_get(url, piece, headers=headers, expected_size=size, displayed_filename=PART)


def _header(url: str) -> tuple[list[tuple[str, dict[str, Any]]], int, int]:
    """Tensors in the order in which they lie, where they begin, and the bytes of the file."""
    first, file = io.BytesIO(), io.BytesIO()
    _get(url, first, 0, 8)
    length = int.from_bytes(first.getvalue(), "little")
    _get(url, file, 8, length)
    header = json.loads(file.getvalue())
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"][0])
    return entries, 8 + length, 8 + length + entries[-1][1]["data_offsets"][1]


def _write_header(file: BinaryIO, entries: list[tuple[str, dict[str, Any]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries:
        first, last = entry["data_offsets"]
        start, end = end, end + last - first
        header[name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _runs(entries: list[tuple[str, dict[str, Any]]]) -> list[tuple[int, int]]:
    """From where to where tensors lie without one of others between them."""
    runs: list[list[int]] = []
    for _, entry in entries:
        first, end = entry["data_offsets"]
        if runs and runs[-1][1] == first:
            runs[-1][1] = end
        else:
            runs.append([first, end])
    return [(first, end) for first, end in runs]
