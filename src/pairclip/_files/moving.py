"""Names that change places, and files that move from an old folder into a new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; whether the system can."""
    if sys.platform not in ("linux", "darwin"):
        return False
    here, swap = -100, 2  # AT_FDCWD, and RENAME_EXCHANGE or RENAME_SWAP
    names = os.fsencode(one), os.fsencode(other)
    with suppress(AttributeError, OSError):  # a C library that lacks the function
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, swap) == 0)
        return bool(library.renameat2(here, names[0], here, names[1], swap) == 0)
    return False


def take_others(old: Path, new: Path) -> None:
    """Have what is in the old folder alone in the new one too."""
    for path in old.iterdir():
        there = new / path.name
        if os.path.lexists(there):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, there, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(path, there)


def _link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def is_fixed(path: Path) -> bool:
    """Whether a folder can't be moved: it is a disk, its parent is not ours, or we are in it."""
    if os.path.ismount(path) or not os.access(path.parent, os.W_OK):
        return True
    here = Path.cwd()
    return any(folder.samefile(path) for folder in (here, *here.parents))
