"""Writing checkpoints, and removing those that are no longer wanted."""

from __future__ import annotations

import errno
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pairclip import _files
from pairclip._files import write_tensors
from pairclip.checkpoints.checkpoint import (
    FILES,
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    WEIGHTS,
    folders_in,
    is_figure,
    manifest_of,
    verified,
)
from pairclip.checkpoints.packing import pack

# Folders that this process wrote or verified, and what their files were then.
_WHOLE: dict[Path, list[tuple[int, int, int]]] = {}
_UNFINISHED = r"\.step-\d{8,}\.[0-9a-f]{32}"
_REPLACED = re.compile(r"\.(step-\d{8,})\.replaced")


def write_checkpoint(
    directory: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    figure: float | None,
    keep: int,
) -> Path:
    """Write one checkpoint, then remove all but the last `keep` and the best.

    `state` is made of dicts, lists, tuples, tensors, numbers, strings, booleans and None.

    Raises:
        OSError: If it can't be written; the earlier checkpoints are then as they were.
        TypeError: If something in `state` can't be written without pickle.
    """
    tensors: dict[str, Tensor] = {}
    content = pack(state, tensors, "state")
    final = directory / f"step-{step:08d}"
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise FileExistsError(f"'{final}' is not a checkpoint, and in the place of one.")
    remove_leftovers(directory)
    with _files.whole_folder(final) as folder:
        for name, its_tensors in ((WEIGHTS, weights), (TENSORS, tensors)):
            with (folder / name).open("xb") as file:
                write_tensors(file, its_tensors)
        (folder / STATE).write_text(json.dumps(content), encoding="utf-8")
        files = {
            name: {"size": (folder / name).stat().st_size, "sha256": _files.checksum(folder / name)}
            for name in FILES
        }
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "figure": figure if is_figure(figure) else None,
            "files": files,
        }
        manifest["sha256"] = _files.checksum_of_fields(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _WHOLE[final] = _state_of_files(final)
    try:
        remove_leftovers(directory)
        _prune(directory, step, keep)
    except OSError as error:
        warnings.warn(f"Old checkpoints could not be removed: {error}.", stacklevel=2)
    return final


def remove_leftovers(directory: Path) -> None:
    """Remove what writers that were killed left behind, or bring back what they had moved.

    Raises:
        OSError: If a checkpoint can't be brought back.

    Warns:
        UserWarning: For each path that can't be removed.
    """
    for path in list(directory.iterdir()) if directory.is_dir() else ():
        if replaced := _REPLACED.fullmatch(path.name):
            _files.restore_replaced(directory / replaced[1])
    _files.remove_leftovers(directory, _UNFINISHED)


def _prune(directory: Path, step: int, keep: int) -> None:
    # Later ones than the step just written are damaged: they were passed over.
    folders = sorted((n, folder) for n, folder in folders_in(directory) if n <= step)[::-1]
    kept: list[Path] = []
    for n, folder in folders:
        if len(kept) < keep and _is_whole(n, folder):
            kept.append(folder)
    rated = [(figure, n, folder) for n, folder in folders for figure in _figure(n, folder)]
    for _, n, folder in sorted(rated, reverse=True):
        if _is_whole(n, folder):
            kept.append(folder)
            break
    for _, folder in folders:
        if folder not in kept:
            _files.remove_folder(folder)
            _WHOLE.pop(folder, None)


def _is_whole(step: int, folder: Path) -> bool:
    """Whether a checkpoint is whole; of an error that says nothing of it, rather yes."""
    try:
        state = _state_of_files(folder)
        if _WHOLE.get(folder) != state:
            verified(step, folder)
            _WHOLE[folder] = state
        return True
    except RecursionError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
    except ValueError as error:
        return isinstance(error, _files.NewerFormatError)


def _state_of_files(folder: Path) -> list[tuple[int, int, int]]:
    stats = [(folder / name).stat() for name in (*FILES, MANIFEST)]
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in stats]


def _figure(step: int, folder: Path) -> list[float]:
    """The figure of a checkpoint, if it has one."""
    try:
        figure = manifest_of(step, folder)["figure"]
    except (OSError, ValueError, RecursionError):
        return []  # a damaged one is not the best
    return [] if figure is None else [figure]
