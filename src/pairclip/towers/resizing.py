"""Models of `transformers` at another image size, by interpolating tables of positions."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from pairclip import _checks


def check_image_size(image_size: int, patch_size: int) -> None:
    """Refuse what is no multiple of the patch size."""
    _checks.check_positive_int("image_size", image_size)
    if image_size % patch_size:
        above = (image_size // patch_size + 1) * patch_size
        raise ValueError(
            f"`image_size` must be a multiple of the patch size {patch_size}, got {image_size}. "
            f"Use {above}."
        )


def resize(model: Any, image_size: int) -> None:
    """Change a model in place to take images of another size, and tell all that keeps the size.

    It is built anew at that size, on no device, to learn which tables and numbers differ.
    """
    config = copy.deepcopy(model.config)
    getattr(config, "vision_config", config).image_size = image_size
    with torch.device("meta"):
        anew = type(model)(config)
    shapes = {name: parameter.shape for name, parameter in anew.named_parameters()}
    for name, old in list(model.named_parameters()):
        if shapes[name] != old.shape:
            owner, _, leaf = name.rpartition(".")
            new = nn.Parameter(resampled(old.detach(), shapes[name]), old.requires_grad)
            setattr(model.get_submodule(owner), leaf, new)
    for name, part in anew.named_modules():
        _tell(model.get_submodule(name), part, image_size)


def _tell(part: Any, anew: nn.Module, image_size: int) -> None:
    for name, value in vars(anew).items():
        if isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
            part.__dict__[name] = value
    for name, buffer in anew._buffers.items():
        own = part._buffers[name]
        if buffer is not None and own.shape != buffer.shape:
            if name != "position_ids":
                raise NotImplementedError(
                    f"`image_size` of a {type(part).__name__} can't be changed: its `{name}` "
                    "would have another shape."
                )
            ids = torch.arange(buffer.shape[-1], device=own.device)
            part._buffers[name] = ids.expand(buffer.shape)
    config: Any = getattr(part, "config", None)
    config = getattr(config, "vision_config", config)
    if hasattr(config, "image_size"):
        config.image_size = image_size


def resampled(table: Tensor, shape: torch.Size) -> Tensor:
    """A table of positions ``[..., D]``, of a square grid after some others, for another grid."""
    rows = table.reshape(-1, table.shape[-1]).float()
    count = math.prod(shape[:-1])
    for extra in range(min(len(rows), count)):  # a class token, registers
        sides = [math.isqrt(number - extra) for number in (len(rows), count)]
        if [side**2 + extra for side in sides] == [len(rows), count]:
            break
    else:
        raise NotImplementedError(
            f"`image_size` can't be changed: a table of {len(rows)} positions is no square grid."
        )
    old, new = sides
    grid = rows[extra:].T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([rows[:extra], grid.flatten(2)[0].T]).reshape(shape).to(table.dtype)
