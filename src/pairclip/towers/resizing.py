"""Models of `transformers` at another image size, by interpolating their position embeddings."""

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

    It is built at both sizes, on no device, to learn which tables and numbers differ. A model that
    can't be changed stays as it is.
    """
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        before = type(model)(copy.deepcopy(config))
        _of_images(config).image_size = image_size
        after = type(model)(config)
    changes: list[tuple[nn.Module, str, Any]] = []
    for (path, new), old in zip(after.named_modules(), before.modules(), strict=True):
        part = model.get_submodule(path)
        for name, value in vars(new).items():
            if isinstance(value, (int, float, tuple)) and value != vars(old)[name]:
                changes.append((part, name, value))
        for name, table in new._parameters.items():
            if table is not None and table.shape != old._parameters[name].shape:
                own = part.get_parameter(name)
                resized = nn.Parameter(resampled(own.detach(), table.shape), own.requires_grad)
                changes.append((part, name, resized))
        for name, buffer in new._buffers.items():
            if buffer is not None and buffer.shape != old._buffers[name].shape:
                if name != "position_ids":
                    raise NotImplementedError(
                        f"`image_size` of a {type(part).__name__} can't be changed: its `{name}` "
                        "would have another shape."
                    )
                ids = torch.arange(buffer.shape[-1], device=part.get_buffer(name).device)
                changes.append((part, name, ids.expand(buffer.shape)))
    for part, name, value in changes:
        setattr(part, name, value)
    for part in model.modules():
        if hasattr(part, "config") and hasattr(_of_images(part.config), "image_size"):
            _of_images(part.config).image_size = image_size


def _of_images(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def set_input_size(model: Any, image_size: int) -> None:
    """Change a model of timm, or what open_clip has around one, in place."""
    try:
        model.set_input_size((image_size, image_size))
    except (
        *(AssertionError, AttributeError, NotImplementedError),
        *(RuntimeError, TypeError, ValueError),
    ) as error:
        raise NotImplementedError(
            f"`image_size` of a {type(model).__name__} can't be changed to {image_size}: {error}"
        ) from error


def resampled(table: Tensor, shape: torch.Size) -> Tensor:
    """Position embeddings ``[..., D]``, of a square grid after some others, for another grid."""
    rows = table.reshape(-1, table.shape[-1]).float()
    count = math.prod(shape[:-1])
    extras = range(min(len(rows), count)) if table.shape[-1] == shape[-1] else ()
    for extra in extras:  # a class token, registers
        sides = [math.isqrt(number - extra) for number in (len(rows), count)]
        if [side**2 + extra for side in sides] == [len(rows), count]:
            break
    else:
        raise NotImplementedError(
            f"`image_size` can't be changed: a table {list(table.shape)} is no square grid of "
            "position embeddings."
        )
    old, new = sides
    grid = rows[extra:].T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([rows[:extra], grid.flatten(2)[0].T]).reshape(shape).to(table.dtype)
