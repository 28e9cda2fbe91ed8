"""A tower for others: its model card, the hub, and its place beside the texts of a whole model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch import nn
from transformers import AutoModel

if TYPE_CHECKING:
    from pairclip.towers.body import Body
    from pairclip.towers.vision_tower import VisionTower

_TAGS = ("pairclip", "image-embeddings", "image-retrieval", "clip", "metric-learning")


def model_card(
    tower: Body,
    *,
    base_model: str | None = None,
    dataset: str | None = None,
    recipe: str | None = None,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    license: str | None = None,
) -> ModelCard:
    """What somebody who finds a tower wants to know: what it is, how good, how to load it.

    Args:
        tower: The tower.
        base_model: Hugging Face id that it was tuned from.
        dataset: What it was tuned on, in a few words.
        recipe: How: loss, rate, steps.
        before: Metrics by name, of the base.
        after: The same of the tower.
        license: Identifier as the hub has it, such as ``"mit"``; that of the base decides.

    Returns:
        A card of huggingface_hub; ``card.save(folder / "README.md")`` writes it.

    Example:
        >>> from pairclip.towers import model_card, random_tower
        >>> card = model_card(random_tower(), after={"recall_at_1": 0.91}, license="mit")
        >>> card.data.license, "| recall_at_1 | | 0.910 |" in card.text
        ('mit', True)
    """
    data = ModelCardData(
        license=license,
        base_model=base_model,
        library_name="transformers" if hasattr(tower.model, "config") else None,
        pipeline_tag="image-feature-extraction",
        tags=list(_TAGS),
    )
    of, kind = f" of `{base_model}`" if base_model else "", type(tower._bare()).__name__
    lines = [
        "# Image tower",
        f"A `{kind}`{of} that turns images of {tower.image_size} x {tower.image_size} pixels into "
        f"embeddings of {tower.embedding_dim} numbers. It was saved by "
        "pairclip, which tunes image towers with pairs of images, so that those of one class are "
        "close.",
    ]
    lines += [f"**Data:** {dataset}"] * bool(dataset) + [f"**Recipe:** {recipe}"] * bool(recipe)
    if before or after:
        names = dict.fromkeys([*(before or {}), *(after or {})])
        rows = [f"| {name} |{_cell(before, name)} |{_cell(after, name)} |" for name in names]
        lines.append("\n".join(["| metric | before | after |", "|---|---:|---:|", *rows]))
    if hasattr(tower._bare(), "visual_projection"):
        lines.append(
            f"**Load it by `{kind}`, not by `AutoModel`**, which has no class with a projection: "
            "that leaves the projection out, as does the pipeline `image-feature-extraction`, and "
            "gives other embeddings."
        )
    lines.append("## Use\n\n```python\n" + "\n\n".join(_ways(tower)) + "\n```")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n")


def _cell(metrics: Mapping[str, float] | None, name: str) -> str:
    return f" {metrics[name]:.3f}" if metrics and name in metrics else ""


def _ways(tower: Body) -> list[str]:
    ways = ['import pairclip\n\ntower = pairclip.load_tower("FOLDER_OR_ID")']
    model: Any = tower._bare()
    kind = type(model)
    if kind.__module__.startswith("transformers."):
        ways.append(
            f"from transformers import {kind.__name__}\n\n"
            f'model = {kind.__name__}.from_pretrained("FOLDER_OR_ID")'
        )
        ways.append(
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("FOLDER_OR_ID")'
        )
    elif kind.__module__.startswith("open_clip."):
        ways.append('import open_clip\n\nopen_clip.create_model("local-dir:FOLDER")')
    elif kind.__module__.startswith("timm."):
        ways.append('import timm\n\ntimm.create_model("local-dir:FOLDER", pretrained=True)')
    return ways


def push_to_hub(
    tower: VisionTower,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    private: bool = True,
    token: str | None = None,
) -> str:
    """Upload what `VisionTower.save_pretrained` writes, with a model card, as one commit.

    Args:
        tower: The tower.
        repo_id: ``"owner/name"`` on the Hugging Face Hub; made if it is missing.
        card: From `model_card`; None is one without data and metrics.
        private: Whether a repository that is made is hidden from others.
        token: Of the hub; None is the one of ``hf auth login``.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tower")
        tower.save_pretrained(path)
        (card or model_card(tower)).save(path / "README.md")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=path, commit_message="Image tower tuned by pairclip"
        )
    return str(commit)


def whole_model(tower: VisionTower, source: str | os.PathLike[str] | nn.Module) -> nn.Module:
    """A model of `transformers` with texts, whose image tower is a tuned one.

    Args:
        tower: Tuned from the image tower of `source`; adapters of PEFT count as merged.
        source: Folder of the whole model, read in float32, or the model itself, which is changed
            in place.

    Returns:
        The whole model, ready for ``save_pretrained``. How texts and images agree after tuning is
        for you to measure: they drift apart.

    Raises:
        ValueError: If the tower's weights are not those of the model's image tower.

    Example:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> from pairclip.towers import random_tower, whole_model
        >>> tower = random_tower(width=32)
        >>> texts = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = CLIPConfig(text_config=texts, vision_config=tower.model.config.to_dict(),
        ...                     projection_dim=tower.embedding_dim)
        >>> model = whole_model(tower, CLIPModel(config))
        >>> bool((model.visual_projection.weight == tower.model.visual_projection.weight).all())
        True
    """
    if isinstance(source, nn.Module):
        model: Any = source
    else:
        model = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    own = dict(model.state_dict())
    weights = tower._merged_weights()
    # A whole model of transformers 5 may hold its image tower one level down.
    names = {name: name if name in own else f"vision_model.{name}" for name in weights}
    for name, value in weights.items():
        target = own.get(names[name])
        if target is None or target.shape != value.shape:
            shape = "none" if target is None else list(target.shape)
            raise ValueError(
                f"`source` {type(model).__name__} has no image tower like this one: `{name}` is "
                f"{list(value.shape)} in the tower and {shape} there. Give the model that the "
                "tower was tuned from."
            )
    for name, value in weights.items():
        own[names[name]].copy_(value)
    return model  # type: ignore[no-any-return]
