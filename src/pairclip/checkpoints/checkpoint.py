"""A checkpoint on the disk: found, verified and read."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pairclip import _files
from pairclip._tensors import MappedTensors
from pairclip.checkpoints.packing import unpack
from pairclip.checkpoints.weights import copy_into
from pairclip.towers import adapters

FORMAT = 1
FILES = WEIGHTS, TENSORS, STATE = "weights.safetensors", "training.safetensors", "state.json"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


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
        copy_into(dict(tower.named_parameters()) | dict(tower.named_buffers()), self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and buffers of the tower, by name."""
        return _read_tensors(self.folder / WEIGHTS)

    def state(self) -> dict[str, Any]:
        """Everything but the weights, as `write_checkpoint` was given it."""
        tensors = _read_tensors(self.folder / TENSORS)
        content: dict[str, Any] = unpack(_files.read_json(self.folder / STATE), tensors)
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
    for step, folder in sorted(folders_in(directory), reverse=True):
        checkpoint = _whole(step, folder)
        if checkpoint is not None:
            return checkpoint
    return None


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
    whole = [_whole(step, folder) for step, folder in folders_in(directory)]
    rated = [c for c in whole if c is not None and c.figure is not None]
    return max(rated, key=lambda c: (c.figure, c.step), default=None)


def folders_in(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Step and folder of what looks like a checkpoint, in no order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return [(int(match[1]), path) for match, path in named if match and path.is_dir()]


def manifest_of(step: int, folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it was written; else a ValueError."""
    manifest = _files.read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is of type {type(manifest).__name__}")
    _files.check_format(manifest.get("format"), FORMAT, f"Checkpoint '{folder}'")
    if manifest.get("sha256") != _files.checksum_of_fields(manifest):
        raise ValueError(f"{MANIFEST} does not have its checksum")
    if manifest["step"] != step:
        raise ValueError(f"its {MANIFEST} is of step {manifest['step']}")
    return manifest


def _whole(step: int, folder: Path) -> Checkpoint | None:
    try:
        manifest = manifest_of(step, folder)
        for name in FILES:
            expected = manifest["files"][name]
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                raise ValueError(f"{name} has {size} bytes instead of {expected['size']}")
            if _files.checksum(folder / name) != expected["sha256"]:
                raise ValueError(f"{name} does not have its checksum")
        return Checkpoint(folder, step, manifest["figure"])
    except _files.NewerFormatError:
        raise
    except (OSError, ValueError) as error:
        warnings.warn(f"Checkpoint '{folder}' is damaged, so passed over: {error}.", stacklevel=3)
        return None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    # A copy of their own: memory that torch has allocated is aligned, and so computes alike.
    return {name: tensor.clone() for name, tensor in MappedTensors(path).items()}
