"""A folder with a folder of images for each class."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from pairclip.datasets.labels import ids_and_names
from pairclip.datasets.source import Source

_IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif"),
    *(".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".tga", ".ico"),
)
# What systems, editors and network drives leave among images.
_SYSTEM = re.compile(
    r"(?:^|[/\\])(?:\.[^/\\]|(?:__MACOSX|@eaDir|\$RECYCLE\.BIN|System Volume Information|"
    r"lost\+found|__pycache__)(?:[/\\]|$))"
)
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


def is_of_system(path: str) -> bool:
    """Whether a part of the path, within a collection, is hidden or a system's."""
    return _SYSTEM.search(path) is not None


class FolderSource(Source):
    """``folder/<class>/.../<image>``; hidden and system entries don't count."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(os.fspath(folder))
        if not root.is_dir():
            raise FileNotFoundError(
                f"`dataset` must be a folder with a folder for each class, got '{root}'. A table "
                "is opened by `TableDataset(path, image=..., label=...)`."
            )
        entries = sorted(entry for entry in root.iterdir() if not is_of_system(entry.name))
        classes = [entry for entry in entries if entry.is_dir()]
        _check_classes(root, classes)
        files = {entry: image_files(entry) for entry in classes}
        empty = [entry.name for entry, paths in files.items() if not paths]
        beside = sum(entry.suffix.lower() in _IMAGES for entry in entries)
        if empty or beside:
            what = [f"{beside} images beside the class folders"] * bool(beside)
            what += [f"the folders {empty[:8]}, which have no images"] * bool(empty)
            warnings.warn(f"Left out of '{root}': {', and '.join(what)}.", stacklevel=2)
        self._paths = [path for paths in files.values() for path in paths]
        names = [entry.name for entry, paths in files.items() for _ in paths]
        super().__init__(folder, *ids_and_names(names, len(names)))

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read."""
        return isinstance(dataset, (str, os.PathLike))

    def image(self, index: int) -> str:
        """The path."""
        return self._paths[index]

    def path(self, index: int) -> str:
        """The path."""
        return self._paths[index]


def image_files(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of all images in a folder, however deep, in the order of their names.

    Hidden entries and those of a system (``.thumbnails``, ``__MACOSX``, ``._x.jpg``) don't count,
    nor do pipes. Linked folders are followed once, with a warning where they lead to a folder
    that is there already.

    Args:
        folder: Where to look.

    Returns:
        The paths, each beginning with `folder`.

    Raises:
        NotADirectoryError: If it is no folder.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from pairclip.datasets import image_files
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.jpg", "._b.jpg", "a.PNG"):
        ...         Image.new("RGB", (4, 4)).save(Path(folder) / name)
        ...     [Path(path).name for path in image_files(folder)]
        ['a.PNG', 'b.jpg']
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise NotADirectoryError(f"`folder` must be a folder of images, got '{root}'.")
    files: list[str] = []
    again: list[str] = []
    visited: set[tuple[int, int]] = set()
    waiting: list[str] = [root]
    links: list[str] = []
    while waiting or links:
        # Links last, so that a folder counts where it really is.
        current = waiting.pop() if waiting else links.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in visited:
            again.append(current)
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            for entry in entries:
                if is_of_system(entry.name):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in _IMAGES and entry.is_file():
                    files.append(entry.path)
        links.sort(reverse=True)
    if again:
        warnings.warn(
            f"{len(again)} linked folders lead to folders that are there already and are not "
            f"followed again, such as '{min(again)}'.",
            stacklevel=2,
        )
    return sorted(files)


def _check_classes(root: Path, classes: list[Path]) -> None:
    names = [entry.name for entry in classes]
    if not names:
        raise ValueError(f"'{root}' has no folders of images, one for each class.")
    check_no_splits(root, names)


def check_no_splits(root: Path, names: list[str]) -> None:
    """Raise if the folders are parts of a dataset: all of them, or one is train and others are."""
    splits = [name for name in names if name.lower() in _SPLITS]
    of_training = [name for name in splits if name.lower() in _SPLITS[:2]]
    if splits and (len(splits) == len(names) or (of_training and len(splits) > 1)):
        raise ValueError(
            f"'{root}' has {' and '.join(splits)}, which are parts of a dataset and no classes. "
            f"Give one of them, for instance '{root / splits[0]}'."
        )
