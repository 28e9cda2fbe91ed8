"""`load_tower`: from an id, a folder, a model object or any module to a tower."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from pairclip.towers.clip import CLIPTower
from pairclip.towers.plain import plain_tower
from pairclip.towers.siglip import SiglipTower
from pairclip.towers.transformers_tower import TransformersTower, quiet
from pairclip.towers.vision_tower import VisionTower

_FAMILIES: tuple[type[TransformersTower], ...] = (CLIPTower, SiglipTower)
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def load_tower(
    source: str | os.PathLike[str] | nn.Module,
    *,
    image_processor: Any = None,
    device: str | torch.device | None = None,
    image_size: int | None = None,
) -> VisionTower:
    """Load the image tower of a CLIP or SigLIP model, or wrap any image encoder.

    From an id or a folder, only the image tower is loaded: from safetensors (a pickle never is),
    in float32 and eval mode. A model object is shared, not copied: training the tower trains it,
    and it keeps its mode, dtype and device.

    Args:
        source: Hugging Face id or local folder of a CLIP or SigLIP model, whole or vision
            only (SigLIP 2 at a fixed resolution is of that type too); or such a model object of
            `transformers`; or any `torch.nn.Module` from pixel values ``[B, 3, H, W]`` to
            embeddings ``[B, D]`` that has a ``preprocess`` or is given an `image_processor`.
        image_processor: For CLIP and SigLIP, an image processor of `transformers` or a processor
            that has one. None is the one saved with `source`; where there is none, the family's
            default at the model's size, with a warning. For any other module, a callable from a
            PIL image to a float tensor ``[3, S, S]``; None is its own ``preprocess``.
        device: Where to put the tower; None leaves it where it is, the CPU for a loaded one.
        image_size: Run at this many pixels, a multiple of the patch size, by interpolating the
            position embeddings once and for all: `VisionTower.save_pretrained` writes a model of
            that size. A model object is changed in place, a given image processor is not.

    Returns:
        The tower.

    Raises:
        OSError: If the hub does not have, or cannot be reached for, the id; as FileNotFoundError
            if a folder or a file in it is missing.
        ValueError: If the model is of another family, its weights are damaged or incomplete, the
            image processor makes images of another size than the model takes, or `image_size`
            is no multiple of the patch size or would be ignored.
        TypeError: If an argument is of the wrong type.

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
    processor = getattr(image_processor, "image_processor", image_processor)
    tower: VisionTower
    if isinstance(source, (str, os.PathLike)):
        family, model, processor = _read(source, processor)
        tower = family.from_model(model, processor, image_size=image_size)
    elif not isinstance(source, nn.Module):
        raise TypeError(
            "`source` must be a Hugging Face id, a folder or a torch.nn.Module, got "
            f"{type(source).__name__}."
        )
    elif own := [family for family in _FAMILIES if isinstance(source, family.model_classes)]:
        tower = own[0].from_model(source, processor, image_size=image_size)
    else:
        name = type(source).__name__
        transform = getattr(source, "preprocess", None) if processor is None else processor
        if transform is None and isinstance(source, PreTrainedModel):
            raise ValueError(_unsupported(name, source.config.model_type))
        if transform is None:
            raise ValueError(
                f"`source` {name} has no `preprocess`. Pass `image_processor`: a callable from a "
                "PIL image to the pixel values [3, S, S] that it takes."
            )
        if image_size is not None:
            raise ValueError(
                f"`image_size` {image_size} would be ignored: only CLIP and SigLIP models change "
                f"size, and `source` is {name}. Resize in its preprocess."
            )
        tower = plain_tower(source, transform)
    return tower if device is None else tower.to(device)


def _read(
    source: str | os.PathLike[str], processor: Any
) -> tuple[type[TransformersTower], Any, Any]:
    """Family, image tower, and the image processor that was given or else saved, or None."""
    folder = _folder_of(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"'{source}' has no config.json, so it is no `transformers` model.")
    model_type = _json(folder / "config.json").get("model_type")
    own = [family for family in _FAMILIES if model_type in family.model_types]
    if not own:
        raise ValueError(_unsupported(f"'{source}'", model_type))
    auto: Any = AutoImageProcessor
    with quiet():
        model = _read_model(source, folder, own[0])
        if processor is None and _has_image_processor(folder):
            processor = auto.from_pretrained(folder, trust_remote_code=False)
    return own[0], model, processor


def _folder_of(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise NotADirectoryError(f"`source` must be a folder, got the file '{source}'.")
    if not (isinstance(source, str) and _HUB_ID.fullmatch(source)):
        raise FileNotFoundError(
            f"`source` '{source}' is neither a folder nor a Hugging Face id ('owner/name')."
        )
    # All files in one request: without a network it fails at once and finds what is cached, where
    # `transformers` would wait half a minute for each.
    wanted = ["config.json", *_PROCESSORS, "model*.safetensors", _INDEX]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except OSError as error:
        raise _not_from_hub(source, error) from error


def _not_from_hub(source: object, error: OSError) -> OSError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OSError(
        f"`source` '{source}' is no folder here and could not be loaded from the Hugging Face Hub "
        f"({reason}). Check the id and the network, or give a local folder."
    )


def _read_model(
    source: str | os.PathLike[str], folder: Path, family: type[TransformersTower]
) -> Any:
    config = AutoConfig.from_pretrained(folder)
    on_disk = _has_safetensors(folder)
    if not on_disk and Path(source).is_dir():
        raise FileNotFoundError(_without_weights(folder))
    try:
        model, found = family.vision_class(config).from_pretrained(
            # The hub keeps the safetensors of some old models in a pull request of its conversion
            # bot; given the id, `transformers` finds them.
            folder if on_disk else source,
            config=family.vision_config(config),
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        if not on_disk and isinstance(error, OSError):
            raise _not_from_hub(source, error) from error
        raise ValueError(
            f"The weights of '{source}' are damaged or do not fit its config.json: {error}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"The weights of '{source}' lack {len(missing)} parameters of the image tower, first "
            f"`{missing[0]}`. Save the whole model, or its image tower, again."
        )
    return model


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _has_safetensors(folder: Path) -> bool:
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return (folder / _WEIGHTS).is_file()
    # `transformers` would unpickle shards that are not safetensors.
    shards = _json(folder / _INDEX).get("weight_map", {}).values()
    return all(shard.endswith(".safetensors") for shard in shards)


def _has_image_processor(folder: Path) -> bool:
    own, nested = (folder / name for name in _PROCESSORS)
    return own.is_file() or (nested.is_file() and "image_processor" in _json(nested))


def _without_weights(folder: Path) -> str:
    message = f"Folder '{folder}' has no weights: {_WEIGHTS} is missing."
    if any(folder.glob("*.bin")):
        message += (
            " It has pickled weights (.bin), which can run code and are never loaded. If you trust "
            "them, load the folder in `transformers` and write safetensors with "
            "`save_pretrained(folder)`."
        )
    return message


def _unsupported(name: str, model_type: str | None) -> str:
    message = (
        f"`source` {name} is of model type {model_type!r}; towers are loaded from CLIP (clip, "
        "clip_vision_model) and SigLIP (siglip, siglip_vision_model)."
    )
    if str(model_type).startswith("siglip2"):
        return message + (
            " SigLIP 2 with native aspect ratio (NaFlex) is not supported: use a checkpoint of "
            "fixed resolution, such as 'google/siglip2-base-patch16-224'."
        )
    return message + " Wrap another model in a module of its own and pass `image_processor`."
