"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from pairclip._files.moving import exchange, is_fixed, take_others

# After which what a writer left behind is not that of one still at work.
ABANDONED_SECONDS = 24 * 3600
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_NEW_FILES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


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
def whole_folder(
    path: str | os.PathLike[str], *, keep_others: bool = False, key: str | None = None
) -> Iterator[Path]:
    """Make a folder that takes the place of `path` when all is written into it, or never.

    As `whole_file` does, in one step where the system can (Linux and macOS, on most file systems).
    Elsewhere a folder that was there is put aside until the new one has its name; where a writer
    was killed in between, `restore_replaced` brings it back.

    Args:
        path: The folder.
        keep_others: Whether files that are in the old folder and not in the new one stay.
        key: A file without which nobody reads the folder. Given it, a folder that can't be moved,
            a mounted disk say, is written into: without this file until all others are there.
    """
    path = Path(path)
    if key is not None and path.exists() and is_fixed(path):
        with _written_into(path, key) as unfinished:
            yield unfinished
        return
    if keep_others:
        remove_leftovers(path.parent, _hidden_names(path), older_than=ABANDONED_SECONDS)
    unfinished = _beside(path)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if keep_others and path.exists():
            take_others(path, unfinished)
        _flush_all(unfinished)
        _put_in_place(unfinished, path)
        flush(path.parent)
    except OSError as error:
        _name_the_file(error, path)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        restore_replaced(path)


def restore_replaced(path: Path) -> None:
    """Bring back the folder that `whole_folder` put aside, or remove it if there is a new one."""
    replaced = put_aside(path)
    while os.path.lexists(replaced):
        try:
            if path.exists():
                remove_folder(replaced)
            else:
                os.rename(replaced, path)
        except FileNotFoundError:
            return  # another was faster
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another writer's is there by now


@contextmanager
def locked(folder: Path, held: str, *, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder, which is on the file ``.lock`` in it and ends with the process.

    Args:
        folder: Is there.
        held: What to say, with the folder before it, if another holds the lock.
        seconds: How long to wait for it.

    Raises:
        OSError: If another holds it.

    Warns:
        UserWarning: If the file system has no locks.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise OSError(errno.EAGAIN, f"'{folder}' {held}") from error
    except (OSError, NotImplementedError) as error:
        # Where no file can be made there is nothing that another could tear.
        if not (isinstance(error, OSError) and error.errno in _NO_NEW_FILES):
            warnings.warn(
                f"'{folder}' can't be locked ({error}): let no other process write there.",
                stacklevel=4,
            )
        yield
        return
    try:
        yield
    finally:
        lock.release()


def put_aside(path: Path) -> Path:
    """Where a folder is while another one takes its place."""
    return path.with_name(f".{path.name}.replaced")


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
    _remove(doomed)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all. Names that are no UTF-8 come back as they were."""
    write_text(path, json.dumps(content, indent=indent) + "\n" * bool(indent))


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


def _beside(path: Path) -> Path:
    # Not all of a name that is as long as a name may be.
    return path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}")


def _hidden_names(path: Path) -> str:
    return rf"\.{re.escape(path.name[:50])}\.[0-9a-f]{{32}}"


def _name_the_file(error: OSError, path: Path) -> None:
    if error.filename is None and error.errno in _OF_THE_DISK:
        error.filename = os.fspath(path)


def _remove(path: Path) -> None:
    try:
        _delete(path)
    except FileNotFoundError:
        pass  # another was faster
    except OSError as error:
        warnings.warn(f"The leftover '{path}' could not be removed: {error}.", stacklevel=4)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(new: Path, path: Path) -> None:
    """Give a folder its name, whatever others do there meanwhile."""
    while True:
        try:
            os.rename(new, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if exchange(new, path):
            return
        try:
            os.rename(path, put_aside(path))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            restore_replaced(path)


def _flush_all(folder: Path) -> None:
    for inner, _, files in os.walk(folder):
        for name in files:
            flush(Path(inner, name))
        flush(Path(inner))


@contextmanager
def _written_into(path: Path, key: str) -> Iterator[Path]:
    remove_leftovers(path, _hidden_names(path), older_than=ABANDONED_SECONDS)
    unfinished = _beside(path / path.name)
    try:
        unfinished.mkdir()
        yield unfinished
        _flush_all(unfinished)
        files = [file.relative_to(unfinished) for file in unfinished.rglob("*") if file.is_file()]
        folders = {path / file.parent for file in files}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        (path / key).unlink(missing_ok=True)
        for file in sorted(files, key=lambda file: file == Path(key)):
            os.replace(unfinished / file, path / file)
        for folder in folders:
            flush(folder)
    except OSError as error:
        _name_the_file(error, path)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
