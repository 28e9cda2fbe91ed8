"""Towers around the models of `transformers`: pixels, sizes, folders."""

from __future__ import annotations

import copy
import json
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel, ImageProcessingMixin
from transformers.utils import logging

from pairclip.towers import resizing, sentence_transformers
from pairclip.towers.measuring import like
from pairclip.towers.modes import evaluating
from pairclip.towers.preprocess import Preprocess, at_size
from pairclip.towers.vision_tower import VisionTower

# Settings that say where a model comes from or how it runs, not what it gives.
_ELSEWHERE = {
    *("transformers_version", "torch_dtype", "dtype", "architectures", "use_cache", "model_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
}


_ONE_AT_A_TIME = threading.RLock()


class TransformersTower(VisionTower):
    """Embeds with the image features, the image embeddings or the pooled output of a model."""

    family: ClassVar[str] = "transformers"
    model_types: ClassVar[tuple[str, ...]] = ()
    # Settings that decide what the same weights give; all of them where none are named.
    deciding: ClassVar[tuple[str, ...]] = ()
    # What the weights begin with that are loaded of a model with texts, if not all.
    weight_prefixes: ClassVar[tuple[str, ...]] = ()
    saves_whole: ClassVar[bool] = True  # of a model with texts all, or the image tower alone
    whole: tuple[Any, ...] = ()  # the model that it is a part of; in a tuple, to own nothing

    @property
    def image_processor(self) -> Any:
        """The image processor of `transformers`."""
        return self.preprocess.transform  # type: ignore[attr-defined]

    @classmethod
    def vision_class(cls, config: Any) -> Any:
        """Class of the model to load for this `config`."""
        named = getattr(transformers, (config.architectures or [""])[0], None)
        # AutoModel takes the projection off a model of images alone.
        keeps = "WithProjection" in str(named) or hasattr(named, "get_image_features")
        return named if keeps or type(config) not in MODEL_MAPPING else AutoModel

    @classmethod
    def default_image_processor(cls, image_size: int) -> Any:
        """What the family does to an image, at `image_size`; None where it isn't known."""
        return None

    @classmethod
    def vision_config(cls, config: Any) -> Any:
        """Settings to load the model with."""
        return config

    @classmethod
    def from_model(
        cls, model: Any, image_processor: Any, *, image_size: int | None
    ) -> TransformersTower:
        """Wrap a model, changed in place to run at `image_size`."""
        check_takes_images(model, type(model).__name__, model.config.model_type)
        config = getattr(model.config, "vision_config", model.config)
        own_size: Any = getattr(config, "image_size", None)
        size: Any = own_size if image_size is None else image_size
        if image_size is not None:
            patch = getattr(config, "patch_size", 1)
            resizing.check_image_size(image_size, patch if isinstance(patch, int) else max(patch))
        if image_processor is None and (default := cls.default_image_processor(size)) is not None:
            warnings.warn(
                f"No image processor came with {type(model).__name__}: using the default one of "
                f"{cls.family} at {size} x {size} pixels. Pass `image_processor` to choose.",
                stacklevel=3,
            )
            image_processor = default
        if not isinstance(image_processor, ImageProcessingMixin):
            raise TypeError(
                f"`image_processor` of a {cls.family} model must be an image processor of "
                f"`transformers`, got {type(image_processor).__name__}."
            )
        if image_size is not None:
            image_processor = at_size(image_processor, image_size)
        if cls.model_types:  # others may take several sizes, and theirs is what is made for them
            _check_output_size(image_processor, size)
        if image_size is not None and image_size != own_size:
            resizing.resize(model, image_size)
        part = cls._image_part(model)
        tower: TransformersTower = cls._around(part, image_processor)
        if part is not model and cls.saves_whole:
            tower.whole = (model,)
        if hasattr(model, "get_image_features"):
            warnings.warn(
                f"Training changes only the image tower of this {type(model).__name__}: its texts "
                "and the tuned images drift apart. Don't compare them after training.",
                stacklevel=3,
            )
        return tower

    @classmethod
    def _image_part(cls, model: Any) -> Any:
        """Of a model with texts, a view with only those children that an image goes through."""
        if not hasattr(model, "get_image_features"):
            return model
        called: list[str] = []
        hooks = [
            child.register_forward_hook(lambda *_, name=name: called.append(name))
            for name, child in model.named_children()
        ]
        config = getattr(model.config, "vision_config", model.config)
        side = getattr(config, "image_size", 224)
        try:
            with torch.no_grad(), evaluating(model):
                cls._encode(model, like(model).new_zeros(1, 3, side, side))
        finally:
            for hook in hooks:
                hook.remove()
        part = copy.copy(model)
        part._parameters = {}
        part._modules = {name: child for name, child in model._modules.items() if name in called}
        for name, child in model._modules.items():
            if name not in called:
                part.__dict__[name] = child
        return part

    @staticmethod
    def _encode(model: Any, pixel_values: Tensor) -> Tensor:
        whole = hasattr(model, "get_image_features")
        output = (model.get_image_features if whole else model)(pixel_values=pixel_values)
        if isinstance(output, Tensor):
            return output
        for name in ("image_embeds", "pooler_output"):
            if output.get(name) is not None:
                embeddings: Tensor = output[name]
                return embeddings.flatten(1)
        raise ValueError(
            f"{type(model).__name__} gives neither `image_embeds` nor `pooler_output`: it has no "
            "pooling head. Use a checkpoint that has one, or wrap it in a module that pools its "
            "`last_hidden_state` into [B, D]."
        )

    def _model_settings(self) -> str:
        config: Any = self._bare().config
        if self.deciding:
            return f"{ {name: getattr(config, name) for name in self.deciding} } "
        own = getattr(config, "vision_config", config).to_dict()
        settings = {k: v for k, v in own.items() if k not in _ELSEWHERE and not k.startswith("_")}
        return f"{type(self._bare()).__name__} {json.dumps(settings, sort_keys=True, default=str)} "

    def _write(self, folder: Path) -> None:
        whole, weights = (*self.whole, self._bare())[0], self._merged_weights()
        if self.whole:
            own = self._bare().state_dict()
            texts = {name: value for name, value in whole.state_dict().items() if name not in own}
            weights |= texts
        with quiet():
            # One file, since an old `model.safetensors` is preferred to new shards beside it.
            whole.save_pretrained(folder, state_dict=weights, max_shard_size="1000GB")
        self.image_processor.save_pretrained(folder)
        sentence_transformers.describe(self, folder)


def check_takes_images(kind: Any, name: str, model_type: str | None) -> None:
    """Refuse what is no image tower.

    Args:
        kind: A model or its class, or None where this version knows none.
        name: What it is called in the error.
        model_type: As configurations say it.

    Raises:
        ValueError: With what to do instead.
    """
    message = f"`source` {name} is of model type {model_type!r}, "
    if str(model_type).startswith("siglip2"):
        raise ValueError(
            f"{message}SigLIP 2 with native aspect ratio (NaFlex), which is not supported: use a "
            "checkpoint of fixed resolution, such as 'google/siglip2-base-patch16-224'."
        )
    is_of_images = getattr(kind, "main_input_name", "") == "pixel_values"
    if kind is None or not (is_of_images or hasattr(kind, "get_image_features")):
        raise ValueError(
            f"{message}which this version of transformers does not know as a model of images. "
            "Towers are loaded from CLIP, SigLIP, DINOv2, ViT and the like. Wrap another model in "
            "a module of its own and pass `image_processor`."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `transformers` from listing text weights, and from progress bars off a terminal."""
    with _ONE_AT_A_TIME:  # its settings are those of all threads
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _check_output_size(image_processor: Any, image_size: int) -> None:
    # Neither square nor of that size, so that a missing resize or crop shows.
    grey = Image.new("RGB", (2 * image_size, image_size + 1), "grey")
    height, width = Preprocess(image_processor)(grey).shape[-2:]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"The image processor makes images of {height} x {width} pixels (from "
            f"{grey.height} x {grey.width}), but the model takes {image_size} x {image_size}. Pass "
            "the `image_processor` of this model, or `image_size` to set both."
        )
