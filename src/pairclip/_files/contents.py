"""What files hold: JSON, checksums, and the number of a format."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no file, or holds something else.
        OSError: If it can't be read.
    """
    check_is_file(path)
    try:
        with named(path):
            return json.loads(path.read_bytes())
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"'{path}' is damaged: it is not valid JSON ({reason}).") from error


def check_is_file(path: Path) -> None:
    """Raise if there is nothing, or what has no end: a pipe, a device, or a link to one."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        is_file = False  # links that lead to each other
    if not is_file:
        raise ValueError(f"'{path}' is damaged: it is not a file.")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Have an error of a disk that can't be read name the file, which the system leaves out."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    check_is_file(path)
    digest = hashlib.sha256()
    with named(path), path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def checksum_of_fields(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object but for its field ``sha256``, however it is laid out."""
    fields = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum in the field ``sha256``."""
    return {**content, "sha256": checksum_of_fields(content)}


def check_seal(content: Any, path: Path) -> None:
    """Raise if what was read from `path` is no JSON object that has its checksum."""
    if not isinstance(content, dict) or content.get("sha256") != checksum_of_fields(content):
        raise ValueError(f"'{path}' is damaged: its checksum differs.")


class NewerFormatError(ValueError):
    """A file that a later version of pairclip wrote."""


def check_format(found: object, newest: int, what: str) -> None:
    """Raise a `NewerFormatError` if `what` is of a later format than this version reads."""
    if isinstance(found, int) and found > newest:
        raise NewerFormatError(
            f"{what} has format {found}, and this version of pairclip reads up to {newest}. "
            "Update pairclip."
        )


def plain(value: Any) -> Any:
    """Dataclasses, dicts and arrays as JSON has them; None where a metric is no finite number."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        missing = ~np.isfinite(value)
        return (np.where(missing, np.array(None), value) if missing.any() else value).tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value
