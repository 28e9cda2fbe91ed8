"""The tensors of the image tower alone, out of a file of safetensors on the hub, by ranges."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from pairclip._files import Entry, Header, header_length, read_header, whole_file, write_header

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
            header = _header(name, url)
            entries = {n: entry for n, entry in header.entries.items() if n.startswith(prefixes)}
            with whole_file(folder / PART) as file:
                layout = {n: (entry.dtype, entry.shape) for n, entry in entries.items()}
                write_header(file, layout, {"format": "pt"})
                for start, end in _runs(entries.values()):
                    _get(url, file, header.size + start, end - start)
        except _NoRangesError:
            return False
    fetched = (folder / PART).stat().st_size
    total = header.size + max((entry.end for entry in header.entries.values()), default=0)
    print(
        f"'{name}': fetched its image tower, {fetched / 1e6:,.1f} MB of {total / 1e6:,.1f}.",
        file=sys.stderr,
    )
    return True


def _get(url: str, file: BinaryIO, start: int, size: int) -> None:
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + size - 1}"}
    piece: Any = _Piece(file, size)
    http_get(url, piece, headers=headers, expected_size=size, displayed_filename=PART)


def _header(name: str, url: str) -> Header:
    file = io.BytesIO()
    _get(url, file, 0, 8)
    try:
        _get(url, file, 8, header_length(file.getvalue()))
        file.seek(0)
        return read_header(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{WHOLE} of '{name}' on the hub is damaged: {error}.") from error


def _runs(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """From where to where tensors lie without one of others between them."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry.start:
            runs[-1] = (runs[-1][0], entry.end)
        else:
            runs.append((entry.start, entry.end))
    return runs
