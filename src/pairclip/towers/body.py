"""A model whose parts are known: what freezing, splitting and rates per layer go by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pairclip.towers import adapters
from pairclip.towers.anatomy import Anatomy, examine
from pairclip.towers.modes import evaluating


class Body(nn.Module):
    """An image encoder, and its blocks.

    Attributes:
        model: What encodes.
        image_size: Height and width, in pixels, of the images that it takes.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.training = model.training

    @staticmethod
    def _encode(model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Embeddings of a model of this kind."""
        embeddings: Tensor = model(pixel_values)
        return embeddings

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in order; NotImplementedError if the model has no row of them."""
        known = self._anatomy()
        row: Any = self._bare().get_submodule(known.parent)._modules
        return [row[name] for name in known.names]

    def _bare(self) -> nn.Module:
        """The model itself, where PEFT or `torch.compile` wrapped it; adapters are still inside."""
        model: nn.Module = adapters.uncompiled(self.model)
        return model

    def _anatomy(self) -> Anatomy:
        model = self._bare()
        known: Anatomy | None = self.__dict__.get("_known")
        if known is None or not known.fits(model):
            # What a gradient reaches is asked, in whatever mode the tower is at this moment.
            with torch.inference_mode(False), torch.autocast(_device(model), enabled=False):
                plain = adapters.merged(model)
                with evaluating(plain):
                    known = examine(plain, self._encode, self._grey(2))
            self._known = known
        return known

    def _grey(self, count: int) -> Tensor:
        """Pixel values of grey images, of the model's type, where the model is."""
        weights = (*self.model.parameters(), *self.model.buffers())
        like = next((p for p in weights if p.is_floating_point()), torch.empty(0, device="cpu"))
        return like.new_zeros(count, 3, self.image_size, self.image_size)

    def _depths(self) -> dict[str, int]:
        """How deep each parameter is: 0 before the blocks, i in block i from 1, then one more."""
        bare = dict(self._bare().named_parameters())
        depths = self._anatomy().depths(bare)
        of = {parameter: depths[name] for name, parameter in bare.items()}
        return {name: of[parameter] for name, parameter in self.named_parameters()}

    def _no_decay(self) -> set[str]:
        """Parameters to which their library gives no weight decay, tables of positions say."""
        return {
            f"model.{path}.{name}".replace("..", ".")
            for path, part in self._bare().named_modules()
            if callable(declared := getattr(part, "no_weight_decay", None))
            for name in declared()
        }

    def _projection(self) -> list[nn.Parameter]:
        """Parameters of the linear map that comes last, or a ValueError that says what does."""
        return self._anatomy().projections(self._bare())


def _device(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")
