"""The towers that a command line names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pairclip

_CONFIGS = ("config.json", "open_clip_config.json", "modules.json")


def check_model(name: str, source: str) -> None:
    """Raise ValueError where a path can be no model, before anything heavy is loaded.

    Args:
        name: What it is called on the command line.
        source: A folder or a Hugging Face id.
    """
    folder = Path(source)
    if not source or folder.is_file():
        what = "is a file" if source else "is empty"
        raise ValueError(f"{name} '{source}' {what}. Give the folder of a model, or an id.")
    if folder.is_dir() and not any((folder / each).is_file() for each in _CONFIGS):
        inside = [each for each in ("tower", "model") if (folder / each / "config.json").is_file()]
        cure = (
            f"Give '{folder / inside[0]}'."
            if inside
            else (
                "Give a folder that `save_pretrained` wrote, or the folder `tower` of what "
                "`pairclip tune` wrote."
            )
        )
        raise ValueError(f"{name} '{source}' has no config.json, so it is no model. {cure}")
    if not folder.exists() and not re.fullmatch(r"(hf-hub:)?(\w[\w.-]*/)?\w[\w.-]*", source):
        raise ValueError(
            f"{name} '{source}' does not exist. Give the folder of a model, or a Hugging Face id "
            "(owner/name)."
        )


def load_model(
    name: str,
    source: str,
    device: Any = None,
    image_size: int | None = None,
    revision: str | None = None,
) -> pairclip.VisionTower:
    """Load a tower.

    Args:
        name: What it is called on the command line.
        source: A folder or a Hugging Face id.
        device: Where to; None takes a GPU if there is one.
        image_size: Pixels, or None for the tower's own.
        revision: Branch, tag or commit of an id.

    Returns:
        The tower.

    Raises:
        ValueError: If it can't be loaded, in words on what to do about it.
    """
    check_model(name, source)
    import torch

    if device is None and torch.cuda.is_available():
        device = "cuda"
    try:
        return pairclip.load_tower(source, device=device, image_size=image_size, revision=revision)
    except (OSError, ValueError) as error:
        if "image_size" in str(error):
            raise
        words = str(error).replace("`source`", "the model")
        cure = " Without a network, give a folder that transformers saved."
        raise ValueError(f"{name}: {words}{cure * isinstance(error, OSError)}") from error
