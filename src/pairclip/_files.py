"""Files that are there whole or not at all, and values as JSON has them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file through a hidden one beside it, so that no reader sees half of it."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, down to the disk; a failure is an OSError."""
    path.touch()
    mode = path.stat().st_mode
    plain_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain_tensors, path)
    except SafetensorError as error:
        raise OSError(f"'{path}' can't be written: {error}") from error
    path.chmod(mode)  # safetensors leaves a file that only its owner can read
    flush(path)


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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Dataclasses, dicts and arrays as JSON has them; None where a figure is NaN."""
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
