"""Towers around the models of timm: an object, an id or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pairclip._files import write_tensors
from pairclip.towers import adapters
from pairclip.towers.hub import CONFIG, without_weights
from pairclip.towers.measuring import first_output
from pairclip.towers.optional import needs
from pairclip.towers.preprocess import warn_if_other
from pairclip.towers.ranges import WHOLE
from pairclip.towers.resizing import set_input_size
from pairclip.towers.vision_tower import VisionTower


class TimmTower(VisionTower):
    """Embeds with what a model of timm gives without its classifier."""

    data_config: dict[str, Any]
    _encode = staticmethod(first_output)

    @staticmethod
    def takes(source: nn.Module) -> bool:
        """Whether it is a model of timm."""
        return hasattr(source, "pretrained_cfg") and hasattr(source, "forward_features")

    @classmethod
    def from_model(cls, source: Any, transform: Any, *, image_size: int | None) -> TimmTower:
        """Wrap a model, changed in place to run at `image_size`."""
        needs("timm", "timm")
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        if source.num_classes:
            raise ValueError(
                f"`source` {type(source).__name__} has a classifier of {source.num_classes} "
                "classes, whose logits are no embedding. Make it with `num_classes=0`, or take the "
                "classifier off by `model.reset_classifier(0)`."
            )
        made_for = getattr(getattr(source, "patch_embed", None), "img_size", None)
        size = (3, *made_for) if made_for else None
        if image_size is not None:
            if hasattr(source, "set_input_size"):  # a convolutional one takes any size
                set_input_size(source, image_size)
            size = (3, image_size, image_size)
        data_config = resolve_data_config({"input_size": size} if size else {}, model=source)
        if transform is None:
            transform = create_transform(**data_config, is_training=False)
        tower: TimmTower = cls._around(source, transform)
        tower.data_config = data_config
        return tower

    def _write(self, folder: Path) -> None:
        from timm.data.transforms_factory import create_transform
        from timm.models._hub import save_config_for_hf

        saved = create_transform(**self.data_config, is_training=False)
        warn_if_other(self.preprocess, saved)
        model: Any = adapters.merged(self.model)
        sizes = {"img_size": self.image_size} if hasattr(model, "set_input_size") else {}
        described = {"pretrained_cfg": self.data_config}
        save_config_for_hf(model, str(folder / CONFIG), model_config=described, model_args=sizes)
        with (folder / WHOLE).open("wb") as file:
            write_tensors(file, self._merged_weights(), {"format": "pt"})


def read(folder: Path) -> Any:
    """Load from a folder with timm's config.json, without a classifier of ImageNet."""
    needs("timm", "timm")
    import timm

    if not (folder / WHOLE).is_file():
        raise without_weights(folder)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    if model.num_classes:
        model.reset_classifier(0)
    return model.float().eval()
