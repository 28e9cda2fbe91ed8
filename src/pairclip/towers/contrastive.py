"""What CLIP and SigLIP have in common: a class of its own for the image tower of a whole model."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch

from pairclip.towers.transformers_tower import TransformersTower


class ContrastiveTower(TransformersTower):
    """A tower that is loaded without the texts, and saved as a model of images alone."""

    whole_class: ClassVar[Any]
    saves_whole = False
    weight_prefixes = ("vision_model.", "visual_projection.")
    deciding = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")

    @classmethod
    def vision_config(cls, config: Any) -> Any:
        """Settings of the image tower alone, from those of a whole model or of a tower."""
        if not hasattr(config, "vision_config"):
            return config
        vision = copy.deepcopy(config.vision_config)
        if hasattr(config, "projection_dim"):
            # The nested one is unused by a whole model, and left at 512 by many.
            vision.projection_dim = config.projection_dim
        return vision

    @classmethod
    def _image_part(cls, model: Any) -> Any:
        """The image tower of a whole model, sharing its modules."""
        if not isinstance(model, cls.whole_class):
            return model
        with torch.device("meta"):
            tower = cls.vision_class(model.config)(cls.vision_config(model.config))
        for name, _ in list(tower.named_children()):
            # From transformers 5, a whole SiglipModel holds its tower one level down.
            setattr(
                tower, name, getattr(model if hasattr(model, name) else model.vision_model, name)
            )
        tower.training = model.training
        return tower

    def _saved_name(self, name: str) -> str:
        # transformers 4 knows the weights by this prefix only, 5 by both names.
        return name if hasattr(self._bare(), "vision_model") else f"vision_model.{name}"
