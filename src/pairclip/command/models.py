"""The towers that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairclip


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
    import torch

    folder = Path(source)
    configs = ("config.json", "open_clip_config.json", "modules.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in configs):
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
    if device is None and torch.cuda.is_available():
        device = "cuda"
    try:
        return pairclip.load_tower(source, device=device, image_size=image_size, revision=revision)
    except OSError as error:
        raise ValueError(
            f"{name}: {error} Without a network, give a folder that transformers saved."
        ) from error
