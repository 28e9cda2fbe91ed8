"""Files and folders that are there whole or not at all, their checksums, and JSON."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# After which what a writer left behind is not that of one still at work.
ABANDONED_SECONDS = 24 * 3600
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when all is written, or never.

    It is written beside `path` under a name that nobody can guess, as a new file, flushed to the
    disk and renamed. What killed writers of `path` left behind is removed after a day.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as device:  # which a file must not replace, /dev/stdout say
            yield device
        return
    remove_leftovers(path.parent, _hidden_names(path), older_than=ABANDONED_SECONDS)
    unfinished = _beside(path)
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        flush(path.parent)
    except OSError as error:
        _name_the_file(error, path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder that takes the place of `path` when all is written into it, or never.

    As `whole_file` does. A folder that was there is put aside until the new one has its name;
    where a writer was killed in between, `restore_replaced` brings it back.
    """
    path = Path(path)
    unfinished, replaced = _beside(path), _put_aside(path)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for folder, _, files in os.walk(unfinished):
            for name in files:
                flush(Path(folder, name))
            flush(Path(folder))
        if path.exists():
            os.rename(path, replaced)
        os.rename(unfinished, path)
        flush(path.parent)
    except OSError as error:
        _name_the_file(error, path)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        restore_replaced(path)


def restore_replaced(path: Path) -> None:
    """Bring back the folder that `whole_folder` put aside, or remove it if there is a new one."""
    replaced = _put_aside(path)
    if not os.path.lexists(replaced):
        return
    if path.exists():
        _remove(replaced)
    else:
        os.rename(replaced, path)


def remove_leftovers(folder: Path, names: str, *, older_than: float = 0.0) -> None:
    """Remove what killed writers left in a folder under hidden names that match the pattern.

    Warns:
        UserWarning: For each path that can't be removed.
    """
    if not folder.is_dir():
        return
    now = time.time()
    for path in [path for path in folder.iterdir() if re.fullmatch(names, path.name)]:
        try:
            abandoned = now - path.lstat().st_mtime >= older_than
        except FileNotFoundError:
            continue  # its writer has ended
        if abandoned:
            _remove(path)


def remove_folder(path: Path) -> None:
    """Remove a folder, or the link to one; a kill in between leaves none without its files."""
    # A name of its own first.
    doomed = _beside(path)
    os.rename(path, doomed)
    _delete(doomed)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all. Names that are no UTF-8 come back as they were."""
    write_text(path, json.dumps(content, indent=indent) + "\n" * bool(indent))


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file holds something else.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged: it is not valid JSON ({error}).") from error


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # which opens no folder, and flushes no file opened to read
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def checksum_of_fields(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object but for its field ``sha256``, however it is laid out."""
    fields = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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
    """Dataclasses, dicts and arrays as JSON has them; None where a metric is NaN."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        missing = np.isnan(value)
        return (np.where(missing, np.array(None), value) if missing.any() else value).tolist()
    return None if isinstance(value, float) and math.isnan(value) else value


def _beside(path: Path) -> Path:
    # Not all of a name that is as long as a name may be.
    return path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}")


def _hidden_names(path: Path) -> str:
    return rf"\.{re.escape(path.name[:50])}\.[0-9a-f]{{32}}"


def _put_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _name_the_file(error: OSError, path: Path) -> None:
    if error.filename is None and error.errno in _OF_THE_DISK:
        error.filename = os.fspath(path)


def _remove(path: Path) -> None:
    try:
        _delete(path)
    except OSError as error:
        warnings.warn(
            f"'{path}', left by a writer that was killed, could not be removed: {error}.",
            stacklevel=4,
        )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
