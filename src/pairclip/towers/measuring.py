"""What a tower takes and gives, learnt from one grey image."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pairclip.towers.modes import evaluating
from pairclip.towers.preprocess import Preprocess


def measure(
    model: nn.Module, preprocess: Preprocess, encode: Callable[[nn.Module, Tensor], Any]
) -> tuple[int, int]:
    """Size of an embedding, and height and width of the images that the model takes.

    Raises:
        ValueError: If the preprocess makes no square pixel values, or the model no embeddings.
    """
    name = type(model).__name__
    if not callable(preprocess.transform):
        raise TypeError(
            f"`image_processor` must be callable, got {type(preprocess.transform).__name__}."
        )
    pixel_values: Any = preprocess(Image.new("RGB", (224, 224), "grey"))
    shape = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else [0]
    if shape != [3, shape[-1], shape[-1]] or not pixel_values.is_floating_point():
        raise ValueError(
            "The preprocess must turn an image into a float tensor [3, S, S], got "
            f"{_described(pixel_values)}. Resize to a square and end with `ToTensor()`."
        )
    try:
        with torch.no_grad(), evaluating(model):
            embeddings: Any = encode(model, pixel_values[None].to(like(model)))
    except Exception as error:  # whatever a model of anybody raises
        raise ValueError(
            f"{name} could not encode a grey image that its preprocess made {shape}: {error}"
        ) from error
    if not (isinstance(embeddings, Tensor) and embeddings.ndim == 2 and len(embeddings) == 1):
        raise ValueError(
            f"{name} must turn pixel values [B, 3, H, W] into a tensor of embeddings [B, D], got "
            f"{_described(embeddings)} for one image. Wrap it in a module that returns them alone."
        )
    return embeddings.shape[1], shape[-1]


def like(model: nn.Module) -> Tensor:
    """An empty tensor of the type that a model computes in, where the model is."""
    # The first weights of a quantised model are integers.
    weights = chain(model.parameters(), model.buffers())
    first = next((weight for weight in weights if weight.is_floating_point()), None)
    return torch.empty(0, device="cpu") if first is None else first.detach().new_empty(0)


def first_output(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """What a model gives, or the first of several things."""
    output = model(pixel_values)
    embeddings: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return embeddings


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
