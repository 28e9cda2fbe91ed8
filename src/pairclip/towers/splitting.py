"""A tower cut in two that share its modules: a frozen trunk, and a head to train."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip.towers import adapters
from pairclip.towers.base import VisionTower, evaluating
from pairclip.towers.pretrained import PretrainedTower
from pairclip.towers.views import kept, view


class _Part(PretrainedTower):
    """Trunk or head of a tower."""

    def __init__(self, whole: PretrainedTower, model: nn.Module) -> None:
        super().__init__(model, whole.image_processor)
        self.family = whole.family  # type: ignore[misc]
        self.image_size = whole.image_size
        self._whole = (whole,)  # in a tuple, for it is no part of this part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Part:
        """Move or convert all of the tower: its parts share modules, so they belong together."""
        whole: Any = self._whole[0]
        whole._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> NoReturn:
        """Refuse: it would not be a model that `transformers` knows."""
        raise NotImplementedError(
            f"A {type(self).__name__.lower()} is a part of a tower and isn't saved alone. Save the "
            "tower that was split, `tower.save_pretrained(folder)`: training the head trains it."
        )


class Trunk(_Part):
    """What comes before the last blocks: pixel values to features, never trained."""

    def __init__(self, whole: PretrainedTower, model: nn.Module) -> None:
        super().__init__(whole, model)
        self.embedding_dim = self._vision().config.hidden_size
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode ``[B, 3, H, W]`` into features ``[B, T, H]``."""
        with torch.no_grad(), evaluating(self):
            vision = self._vision()
            hidden = vision.embeddings(pixel_values)
            if hasattr(vision, "pre_layrnorm"):
                hidden = vision.pre_layrnorm(hidden)
            features: Tensor = vision.encoder(inputs_embeds=hidden)[0]
        return features


class Head(_Part):
    """The last blocks and what comes after them: features to embeddings."""

    def __init__(self, whole: PretrainedTower, model: nn.Module) -> None:
        super().__init__(whole, model)
        self.embedding_dim = whole.embedding_dim
        self.preprocess = FeaturePreprocess(self._vision().config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Embed features ``[B, T, H]``, of any floating-point type, into ``[B, D]``."""
        weight = next(self.parameters())
        return super().forward(features.to(weight.dtype))


class FeaturePreprocess:
    """Features ``[T, H]`` of one image, of any floating-point type, as float32."""

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size

    def __call__(self, features: Any) -> Tensor:
        """Check the shape and convert."""
        if not (isinstance(features, Tensor) and features.is_floating_point()):
            raise TypeError(
                "The head of a split tower takes a tensor of the trunk's features, got "
                f"{type(features).__name__}. Compute them once, "
                "`features = cache_features(trunk, dataset, folder)`, and use them as the dataset."
            )
        if features.ndim != 2 or features.shape[1] != self.hidden_size:
            raise ValueError(
                f"The features of an image must have shape [T, {self.hidden_size}], got "
                f"{list(features.shape)}. Take them from the trunk of the same `tower.split(k)`."
            )
        return features.float()


def split(tower: PretrainedTower, k: int) -> tuple[VisionTower, VisionTower]:
    """Cut as `PretrainedTower.split` says."""
    blocks = list(tower._vision().encoder.layers.named_children())
    k = _checks.check_count("k", k)
    if k > len(blocks):
        raise ValueError(f"`k` must be at most {len(blocks)}, the tower's blocks, got {k}.")
    cut = len(blocks) - k
    model, vision = adapters.without_wrapper(tower.model), tower._vision()
    for part in (model, vision, vision.encoder):
        if "forward" in vars(part):
            raise NotImplementedError(
                f"The tower's {type(part).__name__} has a `forward` of its own, as offloading "
                "gives it one, which would run all blocks in both halves. Split a tower without it."
            )
    trunk = view(vision, encoder=view(vision.encoder, layers=kept(blocks[:cut])))
    for name in ("post_layernorm", "head"):
        trunk._modules.pop(name, None)
    head = view(
        vision, embeddings=_Through(), encoder=view(vision.encoder, layers=kept(blocks[cut:]))
    )
    if hasattr(vision, "pre_layrnorm"):
        head.pre_layrnorm = _Through()
    # Where the transformer is not the model itself, the model calls it so.
    if vision is not model:
        head = view(model, vision_model=head)
    return Trunk(tower, trunk), Head(tower, head)


class _Through(nn.Module):
    """Stands where pixels were embedded, and lets features through."""

    def forward(self, features: Tensor, **_: Any) -> Tensor:
        return features
