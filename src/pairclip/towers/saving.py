"""A tower's folder, written whole or not at all, with checksums of its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pairclip._files import (
    check_format,
    check_seal,
    checksum,
    read_json,
    sealed,
    whole_folder,
    write_json,
)
from pairclip.towers.publishing import model_card

if TYPE_CHECKING:
    from pairclip.towers.body import Body

# No library looks for a file of this name.
_CHECKSUMS = "pairclip_checksums.json"
_FORMAT = 1
_CARD = "README.md"


def save(tower: Body, folder: str | os.PathLike[str]) -> None:
    """Write as `VisionTower.save_pretrained` says."""
    folder = Path(os.path.realpath(folder))  # of a link, what it leads to is replaced
    if folder.is_file():
        raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
    with whole_folder(folder, keep_others=True, key="config.json") as new:
        try:
            tower._write(new)
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"'{folder}' could not be written: {error}") from error
        files = sorted(path for path in new.rglob("*") if path.is_file())
        sums = {file.relative_to(new).as_posix(): checksum(file) for file in files}
        if not (folder / _CARD).exists():  # a person may have written more into it
            model_card(tower).save(new / _CARD)
        # safetensors leaves a file that only its owner can read
        mode = next(new.glob("*.json")).stat().st_mode
        for file in new.rglob("*.safetensors"):
            file.chmod(mode)
        write_json(new / _CHECKSUMS, sealed({"format": _FORMAT, "files": sums}), indent=2)


def check_files(folder: Path) -> None:
    """Raise if a file in a folder is not as `save` wrote it. Of other folders nothing is known.

    Raises:
        ValueError: If one is damaged, or was changed.
        FileNotFoundError: If one is missing.
    """
    path = folder / _CHECKSUMS
    if not os.path.lexists(path):
        return
    content = read_json(path)
    check_seal(content, path)
    check_format(content.get("format"), _FORMAT, f"'{path}'")
    if not isinstance(content.get("files"), dict):
        raise ValueError(f"'{path}' is damaged: it names no files.")
    for name, expected in content["files"].items():
        file = folder / name
        if not os.path.lexists(file):
            raise FileNotFoundError(
                f"'{file}' is missing. Save the tower again; or, if that was meant, delete "
                f"'{path}'."
            )
        if checksum(file) != expected:
            raise ValueError(
                f"'{file}' is damaged, or was changed after pairclip wrote it: its checksum "
                f"differs. Save the tower again; or, if the change was meant, delete '{path}'."
            )
