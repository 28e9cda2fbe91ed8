"""What the families of `transformers` share: pixels, positions, folders."""

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
from PIL import Image
from torch import Tensor, nn
from transformers import ImageProcessingMixin
from transformers.utils import logging

from pairclip import _checks
from pairclip.towers import adapters
from pairclip.towers.base import Preprocess, VisionTower
from pairclip.towers.views import for_class_token

# Settings that decide what the same weights give.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")


class PretrainedTower(VisionTower):
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
    ) -> PretrainedTower:
        """Wrap a model of the family, changed in place to run at `image_size`."""
        config = cls.vision_config(model.config)
        if not getattr(config, "vision_use_head", True):
            raise ValueError(
                "`source` has no pooling head (`vision_use_head` is False), so it does not embed "
                "images. Use a checkpoint that has one."
            )
        if image_size is not None:
            _check_image_size(image_size, config.patch_size)
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
            image_processor = _at_size(image_processor, image_size)
        _check_output_size(image_processor, size)
        _resize_positions(model, size)
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

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode ``[B, 3, H, W]``, as `preprocess` makes them, into ``[B, D]``."""
        output = for_class_token(self.model, self._vision())(pixel_values=pixel_values)
        embeddings: Tensor = output["image_embeds" if "image_embeds" in output else "pooler_output"]
        return embeddings

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order."""
        return list(self._vision().encoder.layers)

    def _vision(self) -> Any:
        """The transformer inside the model; where PEFT put adapters in, they are in it."""
        return next(part for part in self.model.modules() if "encoder" in part._modules)

    def _depths(self) -> dict[str, int]:
        """How deep each parameter is: 0 before the blocks, i in block i from 1, then one more."""
        vision, blocks = self._vision(), self.blocks
        stem = [vision.embeddings, getattr(vision, "pre_layrnorm", nn.Identity())]
        depth = {
            parameter: i
            for i, part in enumerate([nn.ModuleList(stem), *blocks])
            for parameter in part.parameters()
        }
        after = len(blocks) + 1
        return {name: depth.get(p, after) for name, p in self.named_parameters()}

    def _projection(self) -> nn.Module:
        """The linear projection that comes last, or a ValueError that says what does."""
        model = adapters.without_wrapper(self.model)
        if hasattr(model, "visual_projection"):
            projection: nn.Module = model.visual_projection
            return projection
        there = "a norm and a pooling head" if hasattr(self._vision(), "head") else "a norm"
        raise ValueError(
            f"This {self.family} tower has no projection: after its blocks comes {there}. Use "
            "`all_but_last=0` to train nothing else."
        )

    def split(self, k: int) -> tuple[VisionTower, VisionTower]:
        """Cut as `VisionTower.split` says."""
        # The halves are towers of the same kind, so the import has to wait.
        from pairclip.towers.splitting import split

        return split(self, k)

    def _merged_weights(self) -> dict[str, Tensor]:
        """What `save_pretrained` writes: plain names, with adapters of PEFT merged."""
        model = adapters.merged(self.model)
        # transformers 4 knows the weights by this prefix only, 5 by both names.
        prefix = "" if hasattr(model, "vision_model") else "vision_model."
        return {prefix + name: value for name, value in model.state_dict().items()}

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
            if folder.exists():
                for file in unfinished.iterdir():
                    os.replace(file, folder / file.name)
            else:
                os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def settings(self) -> str:
        """What decides an embedding beside the weights, as text."""
        config = self._vision().config
        kept = {name: getattr(config, name) for name in _SETTINGS}
        return f"{kept} {super().settings()}"

    def _trainable_blocks(self) -> str:
        blocks = self.blocks
        trainable = sum(any(p.requires_grad for p in block.parameters()) for block in blocks)
        return f", {trainable} of {len(blocks)} blocks"


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


def _check_image_size(image_size: int, patch_size: int) -> None:
    _checks.check_positive_int("image_size", image_size)
    if image_size % patch_size:
        above = (image_size // patch_size + 1) * patch_size
        raise ValueError(
            f"`image_size` must be a multiple of the patch size {patch_size}, got {image_size}. "
            f"Use {above}."
        )


def _at_size(image_processor: Any, image_size: int) -> Any:
    """A copy of the image processor that makes images of `image_size`."""
    settings = image_processor.to_dict()
    sizes = {
        name: {side: image_size for side, length in dict(settings[name]).items() if length}
        for name in ("size", "crop_size")
        if settings.get(name)
    }
    return type(image_processor).from_dict(settings, **sizes)


def _check_output_size(image_processor: Any, image_size: int) -> None:
    # Neither square nor of that size, so that a missing resize or crop shows.
    grey = Image.new("RGB", (2 * image_size, image_size + 1), (128, 128, 128))
    height, width = Preprocess(image_processor)(grey).shape[-2:]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"The image processor makes images of {height} x {width} pixels (from "
            f"{grey.height} x {grey.width}), but the model takes {image_size} x {image_size}. Pass "
            "the `image_processor` of this model, or `image_size` to set both."
        )


def _resize_positions(model: nn.Module, image_size: int) -> None:
    """Interpolate the position embeddings, and tell the size to all that keeps it."""
    patches: Any = next(part for part in model.modules() if hasattr(part, "patch_embedding"))
    if patches.image_size == image_size:
        return
    old = patches.position_embedding.weight
    extra = patches.num_positions - patches.num_patches  # the class token, where there is one
    grid, side = round(patches.num_patches**0.5), image_size // patches.patch_size
    with torch.no_grad():
        rows = old[extra:].float().T.reshape(1, -1, grid, grid)
        rows = nn.functional.interpolate(
            rows, size=(side, side), mode="bicubic", align_corners=False
        )
        new = torch.cat([old[:extra], rows.flatten(2)[0].T.to(old.dtype)])
    patches.position_embedding.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    patches.position_embedding.num_embeddings = len(new)
    patches.position_ids = torch.arange(len(new), device=old.device).expand((1, -1))
    patches.image_size, patches.num_patches, patches.num_positions = image_size, side**2, len(new)
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        config = getattr(config, "vision_config", config)
        if hasattr(config, "image_size"):
            config.image_size = image_size
