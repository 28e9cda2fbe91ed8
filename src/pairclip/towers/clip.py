"""CLIP: `CLIPModel` and its image tower with or without projection."""

from typing import Any

from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from pairclip.towers import class_token
from pairclip.towers.contrastive import ContrastiveTower


class CLIPTower(ContrastiveTower):
    """Embeds with the projection where the model has one, else with its pooled output."""

    family = "CLIP"
    model_types = ("clip", "clip_vision_model")
    whole_class = CLIPModel

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode ``[B, 3, H, W]``, as `preprocess` makes them, into ``[B, D]``."""
        return self._encode(class_token.shortened(self.model), pixel_values)

    @classmethod
    def vision_class(cls, config: Any) -> Any:
        """The class without projection only for a model that was saved as one."""
        bare = config.architectures == ["CLIPVisionModel"]
        return CLIPVisionModel if bare else CLIPVisionModelWithProjection

    @classmethod
    def default_image_processor(cls, image_size: int) -> Any:
        """Shorter side to `image_size`, then a centre crop."""
        return CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
        )
