"""Towers around the models of open_clip: an object, its `visual`, or a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairclip._files import MappedTensors, read_json, write_json, write_tensors
from pairclip.towers import adapters
from pairclip.towers.hub import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, without_weights
from pairclip.towers.measuring import first_output
from pairclip.towers.open_clip_config import config_of
from pairclip.towers.optional import needs
from pairclip.towers.preprocess import warn_if_other
from pairclip.towers.resizing import check_image_size, resampled, set_input_size
from pairclip.towers.vision_tower import VisionTower

_IMAGE = "visual."  # what weights of the image tower begin with in those of a whole model


class OpenClipTower(VisionTower):
    """Embeds with the image tower of an open_clip model.

    The text tower and the tokenizer of the folder that it was loaded from are saved with it.
    """

    _encode = staticmethod(first_output)
    whole: tuple[nn.Module, ...] = ()  # the model that it is a part of; in a tuple, to own nothing

    @staticmethod
    def takes(source: nn.Module) -> bool:
        """Whether it is a model of open_clip, or what its `create_model` gives."""
        modules = {type(part).__module__.split(".")[0] for part in (source, _visual(source))}
        return bool(modules & {"open_clip", "clip"}) and hasattr(_visual(source), "forward")

    @classmethod
    def from_model(
        cls, source: nn.Module, transform: Any, *, image_size: int | None
    ) -> OpenClipTower:
        """Wrap a model, changed in place to run at `image_size`."""
        visual: Any = _visual(source)
        if image_size is not None:
            _resize(visual, image_size)
        tower: OpenClipTower = cls._around(
            visual, _transform(visual) if transform is None else transform
        )
        if visual is not source:
            tower.whole = (source,)
        return tower

    def _write(self, folder: Path) -> None:
        """The whole model with other image weights; of a folder that it came from, all else."""
        config, texts = self._rest()
        config["model_cfg"]["vision_cfg"]["image_size"] = self.image_size
        for path in () if self.origin is None else self.origin.iterdir():
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".gz"):
                shutil.copy2(path, folder)
        write_json(folder / OPEN_CLIP_CONFIG, config, indent=2)
        size = (self.image_size, self.image_size)
        warn_if_other(self.preprocess, _transform_of(_preprocess_cfg(config, size)))
        images = {_IMAGE + name: value for name, value in self._merged_weights().items()}
        with (folder / OPEN_CLIP_WEIGHTS).open("wb") as file:
            write_tensors(file, {**texts, **images}, {"format": "pt"})

    def _rest(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration, and the weights beside those of the image tower."""
        if self.origin is not None:
            config = read_json(self.origin / OPEN_CLIP_CONFIG)
            weights: Mapping[str, Tensor] = MappedTensors(weights_file(self.origin))
        elif self.whole:
            (whole,) = self.whole
            config, weights = config_of(whole, adapters.merged(self.model)), whole.state_dict()
        else:
            raise NotImplementedError(
                "open_clip loads no image tower without its texts. Give `load_tower` the whole "
                "model, or save the weights alone with "
                "`safetensors.torch.save_model(tower.model, path)`."
            )
        if config is None:
            raise NotImplementedError(
                "No configuration that open_clip knows fits this model, so it can't be saved as a "
                "folder. Register its own by `open_clip.add_model_config`, or load it from a "
                f"folder with {OPEN_CLIP_CONFIG}."
            )
        texts = {name: value for name, value in weights.items() if not name.startswith(_IMAGE)}
        return config, texts


def read(folder: Path) -> Any:
    """Load the image tower alone from a folder: no text tower is built."""
    needs("open_clip", "open-clip")
    from open_clip.model import _build_vision_tower

    config = read_json(folder / OPEN_CLIP_CONFIG)
    model_cfg = config["model_cfg"]
    vision = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    visual: Any = _build_vision_tower(
        model_cfg["embed_dim"], vision, model_cfg.get("quick_gelu", False)
    )
    if hasattr(visual, "set_input_size"):  # that of timm is made at its default size
        visual.set_input_size(vision["image_size"])
    weights = weights_file(folder)
    tensors = {
        name.removeprefix(_IMAGE): value.float()
        for name, value in MappedTensors(weights).items()
        if name.startswith(_IMAGE)
    }
    visual.load_state_dict(tensors)
    visual.preprocess_cfg = _preprocess_cfg(config, visual.image_size)
    return visual.eval()


def weights_file(folder: Path) -> Path:
    """The safetensors of a folder of open_clip.

    Raises:
        FileNotFoundError: If there is none.
    """
    named = sorted(folder.glob("open_clip*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not named:
        raise without_weights(folder, OPEN_CLIP_WEIGHTS)
    return named[0]


def _visual(source: Any) -> Any:
    return getattr(source, "visual", source)


def _preprocess_cfg(config: dict[str, Any], size: Any) -> dict[str, Any]:
    """How a configuration says that images are preprocessed, with the library's defaults."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    own: Any = merge_preprocess_dict(PreprocessCfg(), config.get("preprocess_cfg", {}))
    return {**own, "size": size}


def _transform(visual: Any) -> Any:
    """What the library does to an image, as the model's own settings say."""
    own = getattr(visual, "preprocess_cfg", None)
    if own is None:
        raise ValueError(
            f"`source` {type(visual).__name__} doesn't say how its images are preprocessed. Pass "
            "`image_processor`, such as the last of what `open_clip.create_model_and_transforms` "
            "gives."
        )
    return _transform_of(own)


def _transform_of(preprocess_cfg: dict[str, Any]) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)


def _resize(visual: Any, size: int) -> None:
    """Change an image tower in place."""
    if hasattr(visual, "set_input_size"):
        set_input_size(visual, size)
    elif hasattr(visual, "positional_embedding") and hasattr(visual, "grid_size"):
        patch = visual.patch_size[0]
        check_image_size(size, patch)
        old = visual.positional_embedding
        extra = len(old) - visual.grid_size[0] * visual.grid_size[1]
        visual.image_size, visual.grid_size = (size, size), (size // patch, size // patch)
        shape = torch.Size((extra + visual.grid_size[0] ** 2, old.shape[1]))
        new = nn.Parameter(resampled(old.detach(), shape), old.requires_grad)
        visual.positional_embedding = new
    else:
        raise NotImplementedError(f"`image_size` of a {type(visual).__name__} can't be changed.")
    if hasattr(visual, "preprocess_cfg"):
        visual.preprocess_cfg = {**visual.preprocess_cfg, "size": (size, size)}
