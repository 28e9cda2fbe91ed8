"""A tower's folder, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pairclip._files import whole_folder

if TYPE_CHECKING:
    from pairclip.towers.stored import Stored


def save(tower: Stored, folder: str | os.PathLike[str]) -> None:
    """Write as `VisionTower.save_pretrained` says."""
    folder = Path(folder).absolute()
    if folder.is_file():
        raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
    tower._check_savable()
    with whole_folder(folder) as new:
        tower._write(new)
        # safetensors leaves a file that only its owner can read
        mode = next(new.glob("*.json")).stat().st_mode
        for file in new.rglob("*.safetensors"):
            file.chmod(mode)
        if folder.exists():
            _keep_others(folder, new)


def _keep_others(old: Path, new: Path) -> None:
    """Take over the files of a folder that the new one doesn't have."""
    for path in old.iterdir():
        if (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)
