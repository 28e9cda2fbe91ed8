"""Checkpoints of a fit: whole or absent, and checked before they are believed.

A checkpoint is a folder ``step-00000120`` with the trained weights and all other tensors
(safetensors), everything else that decides the rest of the run (JSON), and a manifest with the
size and SHA-256 of each file. It is written under another name, flushed to the disk and renamed,
so a killed process leaves the checkpoints that it had. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pairclip import _files
from pairclip._packing import pack, unpack
from pairclip.towers import adapters

_FORMAT = 1
_SHOWN = 80  # characters of a description
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.step-\d{8,}\.[0-9a-f]{32}")
_REPLACED = re.compile(r"\.(step-\d{8,})\.replaced")
_WEIGHTS, _TENSORS, _STATE, _MANIFEST = (
    "weights.safetensors",
    "training.safetensors",
    "state.json",
    "manifest.json",
)


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
        return _read_tensors(self.folder / _WEIGHTS)

    def state(self) -> dict[str, Any]:
        """Everything but the weights, as `write_checkpoint` was given it."""
        tensors = _read_tensors(self.folder / _TENSORS)
        content: dict[str, Any] = unpack(_read_json(self.folder / _STATE), tensors)
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
    for step, folder in sorted(_folders(directory), reverse=True):
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
    whole = [_whole(step, folder) for step, folder in _folders(directory)]
    rated = [c for c in whole if c is not None and c.figure is not None]
    return max(rated, key=lambda c: (c.figure, c.step), default=None)


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
    unfinished = directory / f".{final.name}.{uuid.uuid4().hex}"
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"'{final}' is not a checkpoint, and in the place of one.")
    remove_leftovers(directory)
    try:
        unfinished.mkdir(parents=True)
        _files.write_tensors(unfinished / _WEIGHTS, weights)
        _files.write_tensors(unfinished / _TENSORS, tensors)
        _write_json(unfinished / _STATE, content)
        files = {
            name: {"size": path.stat().st_size, "sha256": _files.sha256_of(path)}
            for name in (_WEIGHTS, _TENSORS, _STATE)
            for path in [unfinished / name]
        }
        manifest = {"format": _FORMAT, "step": step, "figure": figure, "files": files}
        _write_json(unfinished / _MANIFEST, manifest | {"sha256": _checksum(manifest)})
        _files.flush(unfinished)
        if final.exists():
            # Not removed before the new one is there: `remove_leftovers` brings it back.
            os.rename(final, directory / f".{final.name}.replaced")
        os.rename(unfinished, final)
        _files.flush(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
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
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and not (directory / replaced[1]).exists():
            os.rename(path, directory / replaced[1])
        elif replaced or _UNFINISHED.fullmatch(path.name):
            try:
                _delete(path)
            except OSError as error:
                warnings.warn(
                    f"'{path}', left by a writer that was killed, could not be removed: {error}.",
                    stacklevel=2,
                )


def differences(saved: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two descriptions, nested dicts and lists of plain values, differ; a sentence each."""
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in [*saved, *(key for key in now if key not in saved)]:
            path = f"{name}.{key}" if name else str(key)
            yield from differences(saved.get(key), now.get(key), path)
    elif saved != now:
        there, here = repr(saved), repr(now)
        pairs = enumerate(zip(there, here, strict=False))
        first = next((i for i, (one, other) in pairs if one != other), 0)
        there, here = (_around(first, text) for text in (there, here))
        yield f"{name} is {there} there and {here} here"


def _around(place: int, text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    start = max(0, place - _SHOWN // 3)
    return f"{'...' * (start > 0)}{text[start : start + _SHOWN - 3]}..."


def trained_tensors(tower: nn.Module) -> dict[str, Tensor]:
    """What training changes in a tower: trainable parameters and saved buffers, by name.

    The names are those in the tower itself, where PEFT wrapped it.
    """
    tower = adapters.without_wrapper(tower)
    saved = tower.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in tower.named_buffers() if name in saved}
    return {name: p for name, p in tower.named_parameters() if p.requires_grad} | buffers


def copy_into(targets: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same name; all or none.

    Raises:
        ValueError: If one has no counterpart, or one of another shape.
    """
    for name, tensor in source.items():
        if name not in targets:
            raise ValueError(
                f"The checkpoint has the weight `{name}`, which the tower lacks. Load the tower "
                "from the source that it was trained from; if PEFT had put adapters into it, put "
                "the same ones in first, by `peft.get_peft_model`."
            )
        if targets[name].shape != tensor.shape:
            raise ValueError(
                f"The checkpoint's weight `{name}` has shape {list(tensor.shape)}, the tower's "
                f"{list(targets[name].shape)}. Load the tower from the source that it was trained "
                "from."
            )
    with torch.no_grad():
        for name, tensor in source.items():
            targets[name].copy_(tensor)


def _folders(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    directory = Path(directory)
    if not directory.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return [(int(match[1]), path) for match, path in named if match and path.is_dir()]


def _whole(step: int, folder: Path) -> Checkpoint | None:
    try:
        manifest = _manifest(step, folder)
        for name in (_WEIGHTS, _TENSORS, _STATE):
            expected = manifest["files"][name]
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                raise ValueError(f"{name} has {size} bytes instead of {expected['size']}")
            if _files.sha256_of(folder / name) != expected["sha256"]:
                raise ValueError(f"{name} does not have its checksum")
        return Checkpoint(folder, step, manifest["figure"])
    except _Newer:
        raise
    except (OSError, ValueError) as error:
        warnings.warn(f"Checkpoint '{folder}' is damaged, so passed over: {error}.", stacklevel=3)
        return None


def _manifest(step: int, folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it was written; else a ValueError."""
    try:
        manifest = _read_json(folder / _MANIFEST)
    except ValueError as error:
        raise ValueError(f"{_MANIFEST} is not valid JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{_MANIFEST} is of type {type(manifest).__name__}")
    version = manifest.get("format")
    if isinstance(version, int) and version > _FORMAT:
        raise _Newer(
            f"Checkpoint '{folder}' has format {version}, and this version of pairclip reads up to "
            f"{_FORMAT}. Update pairclip."
        )
    if manifest.pop("sha256", None) != _checksum(manifest):
        raise ValueError(f"{_MANIFEST} does not have its checksum")
    if manifest["step"] != step:
        raise ValueError(f"its {_MANIFEST} is of step {manifest['step']}")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class _Newer(ValueError):
    """A checkpoint that is whole, but of a newer format."""


def _prune(directory: Path, step: int, keep: int) -> None:
    # Later ones than the step just written are damaged: they were passed over.
    folders = sorted((n, folder) for n, folder in _folders(directory) if n <= step)[::-1]
    kept = {folder for _, folder in folders[:keep]}
    rated = [(figure, n, folder) for n, folder in folders for figure in _figure(n, folder)]
    if rated:
        kept.add(max(rated)[2])
    for _, folder in folders:
        if folder not in kept:
            # A name of its own first: a process killed here leaves no checkpoint without files.
            doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            os.rename(folder, doomed)
            _delete(doomed)


def _figure(step: int, folder: Path) -> list[float]:
    """The figure of a checkpoint, if it has one."""
    try:
        figure = _manifest(step, folder)["figure"]
    except (OSError, ValueError):
        return []  # a damaged one is not the best
    return [] if figure is None else [figure]


def _delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    # A copy of their own: memory that torch has allocated is aligned, and so computes alike.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
    _files.flush(path)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
