"""Fine-tune a tower by a recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pairclip.datasets import LabelledImages
from pairclip.embedding import open_images
from pairclip.finetuner import Finetuner
from pairclip.losses import PreservingLoss
from pairclip.recipes.recipe import Recipe, default_loss
from pairclip.towers import VisionTower, interpolate, tower_of
from pairclip.towers.freezing import freeze


def tune(
    tower: VisionTower,
    dataset: Any,
    recipe: Recipe,
    *,
    keep: Any = None,
    micro_batch_size: int | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> VisionTower:
    """Fine-tune a copy of a tower by a recipe.

    Args:
        tower: The tower to start from; it is not changed.
        dataset: Any labelled dataset that `LabelledImages` takes.
        recipe: How to train: one of yours, of `default_recipes`, or what `compare_recipes` found.
        keep: Unlabelled images, or a dataset, for a recipe with a `keep_share`.
        micro_batch_size: Images whose activations are in memory at once; see `Finetuner`.
        num_workers: Processes that load and preprocess images.
        seed: Decides the batches, and the adapters' start.

    Returns:
        A new tower in evaluation mode, with adapters merged, and blended as the recipe says.

    Raises:
        TypeError: If `recipe` is none, as the `best` of a comparison may be.
        ValueError: If `keep` is missing or would be ignored, or the dataset doesn't fit the
            recipe's batches.
        ImportError: If a recipe with `lora_rank` is used without PEFT.

    Example:
        >>> import numpy as np
        >>> from pairclip.recipes import Recipe, tune
        >>> from pairclip.towers import random_tower
        >>> images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
        >>> recipe = Recipe("gentle", steps=2, batch_size=8, preserve_embeddings=0.2, blend=0.75)
        >>> tuned = tune(random_tower(), (images, np.arange(16) % 2), recipe)
        >>> tuned.embedding_dim
        12
    """
    tower = tower_of(tower)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"`recipe` must be a `Recipe`, got {recipe!r}. The `best` of a comparison is None "
            "where the tower is best left as it is."
        )
    trained = train(
        recipe,
        tower,
        LabelledImages(dataset),
        keep=images_to_keep(keep, [recipe]),
        steps=recipe.steps,
        micro_batch_size=micro_batch_size,
        num_workers=num_workers,
        seed=seed,
    )
    return interpolate(tower, trained, recipe.blend)


def images_to_keep(keep: Any, recipes: Sequence[Recipe]) -> LabelledImages | None:
    """Open the images to keep, or raise if there are none for a recipe that needs them."""
    takers = [recipe.name for recipe in recipes if recipe.keep_share]
    if keep is None:
        if takers:
            raise ValueError(f"Recipes {takers} have a `keep_share`: give `keep`, images for them.")
        return None
    if not takers:
        raise ValueError("`keep` would be ignored: no recipe has a `keep_share`.")
    return open_images(keep)


def train(
    recipe: Recipe,
    tower: VisionTower,
    data: LabelledImages,
    *,
    keep: LabelledImages | None,
    steps: int,
    micro_batch_size: int | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> VisionTower:
    """A trained copy of a tower, or of the head of a split one, before it is blended."""
    loss: Any = default_loss() if recipe.loss is None else copy.deepcopy(recipe.loss)
    if recipe.preserve_similarities:
        loss = PreservingLoss(loss, weight=recipe.preserve_similarities, what="similarities")
    if recipe.preserve_embeddings:
        loss = PreservingLoss(loss, weight=recipe.preserve_embeddings)
    module = _prepared(recipe, copy.deepcopy(tower), seed)
    options: dict[str, Any] = {}
    if recipe.keep_share:
        options = {"keep": keep, "keep_share": recipe.keep_share}
    finetuner = Finetuner(
        module,
        loss,
        learning_rate=recipe.learning_rate,
        micro_batch_size=micro_batch_size,
        seed=seed,
    )
    finetuner.fit(
        data,
        batch_size=recipe.batch_size,
        max_steps=steps,
        num_workers=num_workers,
        **options,
    )
    return module


def _prepared(recipe: Recipe, tower: VisionTower, seed: int) -> VisionTower:
    """The tower with what doesn't train frozen, and adapters in where the recipe has some."""
    if recipe.lora_rank is None:
        if recipe.train_blocks is not None:
            freeze(tower, None, all_but_last=recipe.train_blocks, all_but=None)
        return tower
    from peft import LoraConfig, get_peft_model

    blocks = tower.blocks
    count = len(blocks) if recipe.train_blocks is None else recipe.train_blocks
    if not 0 < count <= len(blocks):
        raise ValueError(
            f"`train_blocks` must be from 1 to {len(blocks)}, the tower's blocks, for a recipe "
            f"with a `lora_rank`, got {count}."
        )
    last = blocks[len(blocks) - count :]
    parts = {id(part) for block in last for part in block.modules() if type(part) is nn.Linear}
    names = [name for name, part in tower.named_modules() if id(part) in parts]
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        get_peft_model(tower, config)  # puts them into this very tower
    return tower
