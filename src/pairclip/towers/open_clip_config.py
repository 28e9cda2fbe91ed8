"""The configuration of an open_clip model, which doesn't know it: the registered one that fits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from pairclip.towers.module_settings import settings_of


def config_of(whole: Any, visual: Any) -> dict[str, Any] | None:
    """What `open_clip_config.json` says of a model, or None if none of its library is like it.

    Args:
        whole: The model with its texts.
        visual: Its image tower without adapters, at any size.
    """
    import open_clip

    side = visual.image_size
    side = side[0] if isinstance(side, (tuple, list)) else side
    for name in open_clip.list_models():
        config = copy.deepcopy(open_clip.get_model_config(name))
        config["vision_cfg"]["image_size"] = side
        if _may_fit(config, whole) and _fits(config, whole, visual):
            if type(whole).__name__ == "CustomTextCLIP":
                config["custom_text"] = True
            return {"model_cfg": config, "preprocess_cfg": getattr(visual, "preprocess_cfg", {})}
    return None


def _may_fit(config: dict[str, Any], whole: Any) -> bool:
    """Look at what a glance tells, for building a model takes a moment."""
    texts, images = config["text_cfg"], config["vision_cfg"]
    shapes = _shapes(whole)
    words = next((shape for name, shape in shapes.items() if "token_embedding" in name), None)
    trunk = getattr(getattr(whole.visual, "trunk", None), "pretrained_cfg", {})
    return (
        "hf_model_name" not in texts  # built from a file of the hub
        and ("multimodal_cfg" in config) == (type(whole).__name__ == "CoCa")
        and words == (texts.get("vocab_size", 49408), texts.get("width", 512))
        and images.get("timm_model_name", "").split(".")[0] == trunk.get("architecture", "")
    )


def _fits(config: dict[str, Any], whole: Any, visual: Any) -> bool:
    kind: Any = type(whole)
    config = {key: value for key, value in config.items() if key != "custom_text"}
    try:
        with torch.device("meta"):
            other = kind(**copy.deepcopy(config))
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return False
    for name in ("image_mean", "image_std"):  # of what is made by `create_model`
        if hasattr(visual, name):
            setattr(other.visual, name, getattr(visual, name))
    return (
        _shapes(other) == _shapes(whole) | _shapes(visual, "visual.")
        and settings_of(other.visual) == settings_of(visual)
        and _texts(other) == _texts(whole)
    )


def _texts(model: nn.Module) -> list[str]:
    lines = settings_of(model).splitlines()
    return [line for line in lines[1:] if not line.startswith("visual")]


def _shapes(model: nn.Module, prefix: str = "") -> dict[str, torch.Size]:
    return {prefix + name: value.shape for name, value in model.state_dict().items()}
