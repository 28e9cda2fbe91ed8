"""`load_tower`: from an id, a folder, a model object or any module to a tower."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    PreTrainedModel,
)

from pairclip import _checks
from pairclip._files import read_json
from pairclip.towers import (
    hub,
    open_clip_tower,
    ranges,
    resizing,
    sentence_transformers,
    timm_tower,
)
from pairclip.towers.clip import CLIPTower
from pairclip.towers.open_clip_tower import OpenClipTower
from pairclip.towers.optional import needs
from pairclip.towers.plain import PlainTower
from pairclip.towers.saving import check_files
from pairclip.towers.siglip import SiglipTower
from pairclip.towers.timm_tower import TimmTower
from pairclip.towers.transformers_tower import TransformersTower, check_takes_images, quiet
from pairclip.towers.vision_tower import VisionTower

# Models of transformers of which more is known than their class says.
_FAMILIES: tuple[type[TransformersTower], ...] = (CLIPTower, SiglipTower)


def load_tower(
    source: str | os.PathLike[str] | nn.Module,
    *,
    image_processor: Any = None,
    device: str | torch.device | None = None,
    image_size: int | None = None,
    revision: str | None = None,
) -> VisionTower:
    """Load the image tower of a CLIP or SigLIP model, or wrap any image encoder.

    From an id or a folder it is loaded from safetensors (a pickle never is), in float32 and eval
    mode, of CLIP and SigLIP without the texts. A model object is shared, not copied: training the
    tower trains it, and it keeps its mode, dtype and device.

    Args:
        source: Hugging Face id or local folder of a model of `transformers` that embeds images
            (CLIP, SigLIP, MetaCLIP 2, DINOv2, ViT and the like, with texts or without), of
            open_clip or of timm; or such a model object, or a ``SentenceTransformer`` of images; or
            any `torch.nn.Module` from pixel values ``[B, 3, H, W]`` to embeddings ``[B, D]`` that
            has a ``preprocess`` or is given an `image_processor`.
        image_processor: What turns an image into pixel values; None is what the source's library
            does with it. For models of `transformers`, an image processor of it or a processor
            that has one; where CLIP and SigLIP have none, the family's default at the model's
            size is used, with a warning. For all else, a callable from a PIL image to a float
            tensor ``[3, S, S]``.
        device: Where to put the tower; None leaves it where it is, the CPU for a loaded one.
        image_size: Run at this many pixels, a multiple of the patch size, by interpolating the
            position embeddings once and for all: `VisionTower.save_pretrained` writes a model of
            that size. A model object is changed in place, a given image processor is not.
        revision: Branch, tag or commit of an id on the hub.

    Returns:
        The tower.

    Raises:
        OSError: If the hub does not have, or cannot be reached for, the id; as FileNotFoundError
            if a folder or a file in it is missing.
        ValueError: If the model embeds no images, its weights are damaged or incomplete, a file of
            `VisionTower.save_pretrained` is not as it was written, the image processor makes
            images of another size than the model takes, or `image_size` is no multiple of the
            patch size, or an argument would be ignored.
        TypeError: If an argument is of the wrong type.
        NotImplementedError: If a model of its kind can't change its image size.
        ImportError: If the source's library is optional and not installed.

    Example:
        >>> from PIL import Image
        >>> from transformers import CLIPImageProcessor, CLIPVisionConfig
        >>> from transformers import CLIPVisionModelWithProjection
        >>> from pairclip import load_tower
        >>> config = CLIPVisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        ...     image_size=32, patch_size=8, projection_dim=16,
        ... )
        >>> tower = load_tower(
        ...     CLIPVisionModelWithProjection(config),  # or "openai/clip-vit-base-patch32"
        ...     image_processor=CLIPImageProcessor(),
        ...     image_size=48,
        ... )
        >>> pixel_values = tower.preprocess(Image.new("RGB", (640, 480)))
        >>> pixel_values.shape, tower(pixel_values[None]).shape
        (torch.Size([3, 48, 48]), torch.Size([1, 16]))
    """
    if image_size is not None:
        _checks.check_positive_int("image_size", image_size)
    processor = getattr(image_processor, "image_processor", image_processor)
    tower: VisionTower
    if isinstance(source, (str, os.PathLike)):

        def check(config: Path) -> tuple[str, ...]:
            with _files_named(config.parent):
                return _check_config(config, read_json(config), image_size)

        folder = hub.folder_of(source, revision=revision, check=check)
        # What is loaded is the host's, whatever the default device is.
        with torch.device("cpu"):
            with _files_named(folder):
                kind, model, processor = _read(folder, processor)
            with _files_named(folder) if image_processor is None else nullcontext():
                tower = kind.from_model(model, processor, image_size=image_size)
        tower.origin = sentence_transformers.folder_of_model(folder).absolute()
    elif not isinstance(source, nn.Module):
        raise TypeError(
            "`source` must be a Hugging Face id, a folder or a torch.nn.Module, got "
            f"{type(source).__name__}."
        )
    elif revision is not None:
        raise ValueError(f"`revision` {revision!r} would be ignored: `source` is an object.")
    else:
        model = source
        if (parts := sentence_transformers.parts_of(source)) is not None:
            model, own = parts
            processor = own if processor is None else processor
        tower = _kind_of(model, processor).from_model(model, processor, image_size=image_size)
    return tower if device is None else tower.to(device)


@contextmanager
def _files_named(folder: Path) -> Iterator[None]:
    """Say of an error of a library, which tells of what is in a file, whose file it was."""
    try:
        yield
    except (OSError, ImportError, NotImplementedError):
        raise
    except Exception as error:
        named = isinstance(error, ValueError)
        if f"{error}".startswith("`") or (named and str(folder) in f"{error}"):
            raise  # of an argument, or it names the folder
        if named:
            raise ValueError(f"'{folder}': {error}") from error
        raise ValueError(
            f"'{folder}' can't be loaded. Its files may be damaged, or of another version of their "
            f"library: {type(error).__name__}: {error}"
        ) from error


def _kind_of(source: nn.Module, processor: Any) -> Any:
    if isinstance(source, PreTrainedModel):
        if processor is None and hasattr(source, "preprocess"):
            return PlainTower
        return _family(source.config.model_type)
    return next((kind for kind in (OpenClipTower, TimmTower) if kind.takes(source)), PlainTower)


def _family(model_type: str) -> type[TransformersTower]:
    families = (family for family in _FAMILIES if model_type in family.model_types)
    return next(families, TransformersTower)


def _check_config(
    path: Path, config: dict[str, Any], image_size: int | None = None
) -> tuple[str, ...]:
    """Refuse a model that is no image tower, or can't take the size, by its configuration alone.

    Returns:
        What the names of the weights begin with that are loaded; nothing if all are.
    """
    if path.name == hub.OPEN_CLIP_CONFIG:
        needs("open_clip", "open-clip")
        return ()
    if "architecture" in config:
        needs("timm", "timm")
        return ()
    model_type = config.get("model_type")
    check_takes_images(_model_class(config), f"'{path.parent}'", model_type)
    patch_size = config.get("vision_config", config).get("patch_size")
    if image_size is not None and isinstance(patch_size, int):
        resizing.check_image_size(image_size, patch_size)
    return _family(str(model_type)).weight_prefixes if "vision_config" in config else ()


def _model_class(config: dict[str, Any]) -> Any:
    """Class of a model of transformers, or None if it is of a later version, or of nobody."""
    try:
        return MODEL_MAPPING[CONFIG_MAPPING[str(config.get("model_type"))]]
    except KeyError:
        return getattr(transformers, (config.get("architectures") or [""])[0], None)


def _read(folder: Path, processor: Any) -> tuple[Any, Any, Any]:
    """What `_read_once` reads, all of one model though another one is saved there meanwhile."""
    while True:
        before = _state_of(folder)
        try:
            read = _read_once(folder, processor)
        except Exception:
            if _state_of(folder) == before:
                raise
        else:
            if _state_of(folder) == before:
                return read


def _state_of(folder: Path) -> list[tuple[str, int, int]]:
    """What differs once another model is in the folder."""
    with suppress(FileNotFoundError):
        stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.json"))]
        return [(name, status.st_ino, status.st_mtime_ns) for name, status in stats]
    return []


def _read_once(folder: Path, processor: Any) -> tuple[Any, Any, Any]:
    """Kind of tower, model, and the image processor that was given or else saved, or None."""
    check_files(folder)  # first: what is damaged is not for another library to find
    folder = sentence_transformers.folder_of_model(folder)
    path = folder / hub.CONFIG
    config = read_json(path) if path.is_file() else {}
    if "model_type" not in config:
        if (folder / hub.OPEN_CLIP_CONFIG).is_file():
            return OpenClipTower, open_clip_tower.read(folder), processor
        if "architecture" in config:
            return TimmTower, timm_tower.read(folder), processor
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no config.json, so it is no model of transformers, open_clip or timm."
        )
    _check_config(path, config)
    family = _family(config["model_type"])
    auto: Any = AutoImageProcessor
    with quiet():
        model = _read_model(folder, config, family)
        if processor is None and _has_image_processor(folder):
            processor = auto.from_pretrained(folder, trust_remote_code=False)
    return family, model, processor


def _read_model(folder: Path, content: dict[str, Any], family: type[TransformersTower]) -> Any:
    # A part of a model, some versions name only by its class.
    named = content["model_type"] in CONFIG_MAPPING
    kind = AutoConfig if named else _model_class(content).config_class
    config = kind.from_pretrained(folder)
    if not hub.has_weights(folder):
        raise hub.without_weights(folder)
    whole = (folder / ranges.WHOLE).is_file() or not (folder / ranges.PART).is_file()
    try:
        model, report = family.vision_class(config).from_pretrained(
            folder,
            config=family.vision_config(config),
            dtype=torch.float32,
            use_safetensors=True,
            variant=None if whole else ranges.VARIANT,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"The weights of '{folder}' are damaged or do not fit its config.json: {error}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"The weights of '{folder}' lack {len(missing)} parameters of the image tower, first "
            f"`{missing[0]}`. Save the whole model, or its image tower, again."
        )
    return model.eval()


def _has_image_processor(folder: Path) -> bool:
    own, nested = (folder / name for name in hub.PROCESSORS)
    return own.is_file() or (nested.is_file() and "image_processor" in read_json(nested))
