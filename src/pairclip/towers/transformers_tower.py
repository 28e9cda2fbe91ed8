"""Towers around the models of `transformers`: pixels, sizes, folders."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import ImageProcessingMixin
from transformers.utils import logging

from pairclip.towers import adapters, resizing
from pairclip.towers.preprocess import Preprocess, at_size, grey_image
from pairclip.towers.vision_tower import VisionTower

# Settings that decide what the same weights give.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")


class TransformersTower(VisionTower):
    """A tower whose model is of a family that `transformers` loads and saves."""

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    model_classes: ClassVar[tuple[Any, ...]]  # the whole model first

    def __init__(self, model: Any, image_processor: Any) -> None:
        projected = hasattr(model, "visual_projection")
        super().__init__(
            model,
            Preprocess(image_processor),
            embedding_dim=model.config.projection_dim if projected else model.config.hidden_size,
            image_size=model.config.image_size,
        )
        self.image_processor = image_processor

    @classmethod
    def vision_class(cls, config: Any) -> Any:
        """Class of the image tower of a model with this `config`."""
        raise NotImplementedError

    @classmethod
    def default_image_processor(cls, image_size: int) -> Any:
        """What the family does to an image, at `image_size`."""
        raise NotImplementedError

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
    def from_model(
        cls, model: Any, image_processor: Any, *, image_size: int | None
    ) -> TransformersTower:
        """Wrap a model of the family, changed in place to run at `image_size`."""
        config = cls.vision_config(model.config)
        if not getattr(config, "vision_use_head", True):
            raise ValueError(
                "`source` has no pooling head (`vision_use_head` is False), so it does not embed "
                "images. Use a checkpoint that has one."
            )
        if image_size is not None:
            resizing.check_image_size(image_size, config.patch_size)
        size = config.image_size if image_size is None else image_size
        if image_processor is None:
            warnings.warn(
                f"No image processor came with {type(model).__name__}: using the default one of "
                f"{cls.family} at {size} x {size} pixels. Pass `image_processor` to choose.",
                stacklevel=3,
            )
            image_processor = cls.default_image_processor(size)
        if not isinstance(image_processor, ImageProcessingMixin):
            raise TypeError(
                f"`image_processor` of a {cls.family} model must be an image processor of "
                f"`transformers`, got {type(image_processor).__name__}."
            )
        if image_size is not None:
            image_processor = at_size(image_processor, image_size)
        _check_output_size(image_processor, size)
        if size != config.image_size:
            resizing.resize(model, size)
        if isinstance(model, cls.model_classes[0]):
            warnings.warn(
                f"Training changes only the image tower of this {type(model).__name__}: its texts "
                "and the tuned images drift apart. Don't compare them after training.",
                stacklevel=3,
            )
            model = cls._image_part(model)
        return cls(model, image_processor)

    @classmethod
    def _image_part(cls, model: Any) -> Any:
        """The image tower of a whole model, sharing its modules."""
        with torch.device("meta"):
            tower = cls.vision_class(model.config)(cls.vision_config(model.config))
        for name, _ in list(tower.named_children()):
            # From transformers 5, a whole SiglipModel holds its tower one level down.
            setattr(
                tower, name, getattr(model if hasattr(model, name) else model.vision_model, name)
            )
        tower.training = model.training
        return tower

    @staticmethod
    def _encode(model: Any, pixel_values: Tensor) -> Tensor:
        output = model(pixel_values=pixel_values)
        embeddings: Tensor = output["image_embeds" if "image_embeds" in output else "pooler_output"]
        return embeddings

    def _saved_name(self, name: str) -> str:
        # transformers 4 knows the weights by this prefix only, 5 by both names.
        return name if hasattr(self._bare(), "vision_model") else f"vision_model.{name}"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the image tower and its image processor, for `transformers` and `load_tower`.

        Adapters of PEFT are merged into the weights that are written; the tower keeps them.
        All is written into a folder of another name first, so a failure leaves no half-written
        model. In a folder that exists, files of the same name are replaced and others stay.

        Args:
            folder: Where to write; made if it is missing.

        Raises:
            FileExistsError: If `folder` is a file.
        """
        folder = Path(folder).absolute()
        if folder.is_file():
            raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
        # Where `folder` exists it may be the only one here on its disk, so the inside is used.
        parent = folder if folder.exists() else folder.parent
        unfinished = parent / f".{folder.name}.{uuid.uuid4().hex}"
        model = adapters.without_wrapper(self.model)
        weights = self._merged_weights()
        try:
            unfinished.mkdir(parents=True)
            with quiet():
                # One file, since an old `model.safetensors` is preferred to new shards beside it.
                model.save_pretrained(unfinished, state_dict=weights, max_shard_size="1000GB")
            self.image_processor.save_pretrained(unfinished)
            # safetensors leaves a file that only its owner can read
            mode = (unfinished / "config.json").stat().st_mode
            for file in unfinished.glob("*.safetensors"):
                file.chmod(mode)
            if folder.exists():
                for file in unfinished.iterdir():
                    os.replace(file, folder / file.name)
            else:
                os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _model_settings(self) -> str:
        config: Any = self._bare().config
        own = {name: getattr(config, name) for name in _SETTINGS}
        return f"{own} "


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `transformers` from listing text weights, and from progress bars off a terminal."""
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
    grey = grey_image(2 * image_size, image_size + 1)
    height, width = Preprocess(image_processor)(grey).shape[-2:]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"The image processor makes images of {height} x {width} pixels (from "
            f"{grey.height} x {grey.width}), but the model takes {image_size} x {image_size}. Pass "
            "the `image_processor` of this model, or `image_size` to set both."
        )
