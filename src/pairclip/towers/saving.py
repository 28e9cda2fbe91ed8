"""A tower's folder, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pairclip._files import whole_folder
from pairclip.towers.publishing import model_card

if TYPE_CHECKING:
    from pairclip.towers.stored import Stored


_CARD = "README.md"


def save(tower: Stored, folder: str | os.PathLike[str]) -> None:
    """Write as `VisionTower.save_pretrained` says."""
    folder = Path(folder).resolve()  # of a link, what it leads to is replaced
    if folder.is_file():
        raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
    with whole_folder(folder, keep_others=True, key="config.json") as new:
        tower._write(new)
        if not (folder / _CARD).exists():  # a person may have written more into it
            model_card(tower).save(new / _CARD)
        # safetensors leaves a file that only its owner can read
        mode = next(new.glob("*.json")).stat().st_mode
        for file in new.rglob("*.safetensors"):
            file.chmod(mode)
