"""SigLIP, and SigLIP 2 at a fixed resolution: `SiglipModel` and its image tower."""

from typing import Any

from transformers import SiglipImageProcessor, SiglipModel, SiglipVisionModel

from pairclip.towers.contrastive import ContrastiveTower


class SiglipTower(ContrastiveTower):
    """Embeds with the output of the attention pooling head."""

    family = "SigLIP"
    model_types = ("siglip", "siglip_vision_model")
    whole_class = SiglipModel

    @classmethod
    def vision_class(cls, config: Any) -> Any:
        """The only one, which has the pooling head."""
        return SiglipVisionModel

    @classmethod
    def default_image_processor(cls, image_size: int) -> Any:
        """Both sides to `image_size`, whatever the shape."""
        return SiglipImageProcessor(size={"height": image_size, "width": image_size})
