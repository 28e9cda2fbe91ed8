"""A tower around any module that comes with a preprocess."""

from __future__ import annotations

from typing import Any

from torch import nn

from pairclip.towers.vision_tower import VisionTower


class PlainTower(VisionTower):
    """Embeds with what the module gives."""

    @classmethod
    def from_model(cls, module: nn.Module, transform: Any, *, image_size: int | None) -> PlainTower:
        """Wrap a module whose own size is that of its preprocess."""
        name = type(module).__name__
        transform = getattr(module, "preprocess", None) if transform is None else transform
        if transform is None:
            raise ValueError(
                f"`source` {name} has no `preprocess`. Pass `image_processor`: a callable from a "
                "PIL image to the pixel values [3, S, S] that it takes."
            )
        if image_size is not None:
            raise ValueError(
                f"`image_size` {image_size} would be ignored: pairclip doesn't know how a "
                f"{name} changes size. Resize in its preprocess."
            )
        tower: PlainTower = cls._around(module, transform)
        return tower
