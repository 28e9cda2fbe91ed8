"""A checkpoint on the disk: found, verified and read."""

from __future__ import annotations

import math
import os
import re
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from pairclip import _files
from pairclip.checkpoints.packing import unpack
from pairclip.checkpoints.weights import copy_into
from pairclip.towers import adapters

FORMAT = 1
FILES = WEIGHTS, TENSORS, STATE = "weights.safetensors", "training.safetensors", "state.json"
MANIFEST = "manifest.json"
_NAME, _ASIDE = re.compile(r"step-(\d{8,})"), re.compile(r"\.step-(\d{8,})\.replaced")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on the disk.

    Attributes:
        folder: Where it is.
        step: Steps that the run had done.
        figure: Mean average precision of the evaluation at that step, or None.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pairclip import AllPairsCosineLoss, Finetuner, newest_checkpoint
        >>> from pairclip.towers import random_tower
        >>> tower = random_tower()
        >>> images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        >>> data = (images, [0, 0, 0, 0, 1, 1, 1, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Finetuner(tower, AllPairsCosineLoss()).fit(
        ...         data, batch_size=4, epochs=2, checkpoint_dir=folder)
        ...     checkpoint = newest_checkpoint(folder)
        ...     checkpoint.load_weights(tower)
        >>> checkpoint.step
        4
    """

    folder: Path
    step: int
    figure: float | None

    def load_weights(self, tower: nn.Module) -> None:
        """Copy the trained weights into a tower like the one that was trained.

        Args:
            tower: Changed in place. Weights that were frozen are not in a checkpoint, so it must
                come from the same source, with the same adapters of PEFT (wrapped or not).

        Raises:
            ValueError: If a weight is missing or of another shape in `tower`; it is then unchanged.
        """
        tower = adapters.without_wrapper(tower)
        weights = dict(tower.named_parameters()) | dict(tower.named_buffers())
        copy_into({adapters.plain_name(n): w for n, w in weights.items()}, self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and buffers of the tower, by name."""
        return _read_tensors(self.folder / WEIGHTS)

    def state(self) -> dict[str, Any]:
        """Everything but the weights, as ``write_checkpoint`` was given it."""
        path = self.folder / STATE
        tensors, read = _read_tensors(self.folder / TENSORS), _files.read_json(path)
        try:
            content: dict[str, Any] = unpack(read, tensors)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"'{path}' is damaged: it holds no state of a fit.") from error
        return content


def newest_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest whole checkpoint of a folder; damaged ones are passed over.

    Args:
        directory: The `checkpoint_dir` of a fit.

    Returns:
        The checkpoint, every file of which has the checksum that its manifest says; None if
        there is no whole one.

    Raises:
        ValueError: If a checkpoint is of a newer format than this version of pairclip reads.

    Warns:
        UserWarning: For each damaged checkpoint, saying what is wrong with it.

    Example:
        >>> from pairclip import newest_checkpoint
        >>> newest_checkpoint("a folder that is not there") is None
        True
    """
    return _until_none_is_gone(
        lambda: next((c for c in map(_whole, sorted(_listed(directory))[::-1]) if c), None)
    )


def best_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """The whole checkpoint with the highest mean average precision; the newest among equals.

    Args:
        directory: The `checkpoint_dir` of a fit with an `eval_dataset`.

    Returns:
        The checkpoint, checked like that of `newest_checkpoint`; None if none has a figure.

    Raises:
        ValueError: If a checkpoint is of a newer format than this version of pairclip reads.

    Warns:
        UserWarning: For each damaged checkpoint, saying what is wrong with it.

    Example:
        >>> from pairclip import best_checkpoint
        >>> best_checkpoint("a folder that is not there") is None
        True
    """
    whole = _until_none_is_gone(lambda: [c for c in map(_whole, _listed(directory)) if c])
    rated = [c for c in whole if c.figure is not None]
    return max(rated, key=lambda c: (c.figure, c.step), default=None)


def folders_in(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Step and folder of what looks like a checkpoint, in no order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    # Twice, since a list may lack what comes and what goes while it is made.
    names, before = set(os.listdir(directory)), None
    while names != before:
        names, before = set(os.listdir(directory)), names
    # One that a killed writer put aside counts until its successor has its name.
    successors = {_files.put_aside(Path(name)).name for name in names if _NAME.fullmatch(name)}
    matches = [
        match
        for name in names
        if (match := _NAME.fullmatch(name) or _ASIDE.fullmatch(name)) and name not in successors
    ]
    folders = [(int(match[1]), directory / match[0]) for match in matches]
    modes = [folder.lstat().st_mode for _, folder in folders]
    # A link may lead nowhere: a checkpoint that is not there, rather than none.
    return [
        each
        for each, mode in zip(folders, modes, strict=True)
        if stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
    ]


def is_figure(value: object) -> bool:
    """Whether checkpoints can be ordered by it."""
    return type(value) in (int, float) and -math.inf < value < math.inf  # type: ignore[operator]


def manifest_of(step: int, folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it was written; else a ValueError."""
    manifest = _files.read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is of type {type(manifest).__name__}")
    if manifest.get("sha256") != _files.checksum_of_fields(manifest):
        raise ValueError(f"{MANIFEST} does not have its checksum")
    _files.check_format(manifest.get("format"), FORMAT, f"Checkpoint '{folder}'")
    if manifest.get("step") != step:
        raise ValueError(f"its {MANIFEST} is of step {manifest.get('step')}")
    files, figure = manifest.get("files"), manifest.get("figure", "missing")
    for name in FILES:
        entry = files.get(name) if isinstance(files, dict) else None
        if not (isinstance(entry, dict) and {"size", "sha256"} <= set(entry)):
            raise ValueError(f"{MANIFEST} tells nothing of {name}")
    if not (figure is None or is_figure(figure)):
        raise ValueError(f"the figure in its {MANIFEST} is {figure!r}")
    return manifest


def verified(step: int, folder: Path) -> Checkpoint:
    """The checkpoint in a folder, if all of it is as it was written; else a ValueError."""
    manifest = manifest_of(step, folder)
    for name in FILES:
        expected = manifest["files"][name]
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            raise ValueError(f"{name} has {size} bytes instead of {expected['size']}")
        if _files.checksum(folder / name) != expected["sha256"]:
            raise ValueError(f"{name} does not have its checksum")
    return Checkpoint(folder, step, manifest["figure"])


class _GoneError(Exception):
    """A checkpoint that was listed has been removed, or written again, since."""


def _until_none_is_gone(find: Callable[[], _T]) -> _T:
    """Look again as long as a fit beside removes what was seen."""
    while True:
        with suppress(_GoneError):
            return find()


def _listed(directory: str | os.PathLike[str]) -> list[tuple[int, Path, int]]:
    """Step and folder of what looks like a checkpoint, and the folder's number in the system."""
    try:
        return [(step, folder, folder.lstat().st_ino) for step, folder in folders_in(directory)]
    except FileNotFoundError:
        raise _GoneError from None


def _whole(listed: tuple[int, Path, int]) -> Checkpoint | None:
    step, folder, number = listed
    try:
        return verified(step, folder)
    except (OSError, ValueError, RecursionError) as error:
        if not os.path.lexists(folder) or folder.lstat().st_ino != number:
            raise _GoneError from error
        if isinstance(error, _files.NewerFormatError):
            raise
        warnings.warn(f"Checkpoint '{folder}' is damaged, so passed over: {error}.", stacklevel=6)
        return None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    # A copy of their own: memory that torch has allocated is aligned, and so computes alike.
    return {name: tensor.clone() for name, tensor in _files.MappedTensors(path).items()}
