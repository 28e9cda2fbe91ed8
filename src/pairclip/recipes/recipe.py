"""One way to fine-tune a tower, as a value; and a sound handful of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from pairclip import _checks
from pairclip.finetuner.identity import describe
from pairclip.losses import AllPairsCosineLoss
from pairclip.towers import VisionTower, tower_of

_SMALL = 10_000_000  # parameters; what is customary for CLIP is for larger towers


@dataclass(frozen=True)
class Recipe:
    """One way to fine-tune a tower.

    Attributes:
        name: What tables call it.
        loss: Loss of a batch's embeddings and labels, copied for each training; None for
            ``AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)``.
        learning_rate: Peak rate of AdamW.
        steps: Length of the whole training.
        batch_size: Images of a step.
        train_blocks: How many of the last blocks train, with what comes after them; None trains
            all of the tower.
        lora_rank: Rank of low-rank adapters in the linear layers of these blocks, which then
            train alone (needs PEFT); None puts in none.
        preserve_embeddings: Weight of the distance of each embedding to that of the untouched
            tower: see `PreservingLoss`.
        preserve_similarities: The same for the similarities of pairs.
        keep_share: Share of a step's images that are unlabelled, in ``[0, 1)``; they count in
            what is preserved of embeddings alone.
        blend: Share of the trained weights in the result; the rest is of the untouched tower: see
            `interpolate`.

    Raises:
        ValueError: If a value is out of range, or would be ignored.

    Example:
        >>> from pairclip import Recipe
        >>> recipe = Recipe("gentle", learning_rate=1e-4, preserve_embeddings=0.2, blend=0.75)
        >>> recipe.steps
        600
    """

    name: str
    loss: Callable[..., Any] | None = None
    learning_rate: float = 1e-5
    steps: int = 600
    batch_size: int = 128
    train_blocks: int | None = None
    lora_rank: int | None = None
    preserve_embeddings: float = 0.0
    preserve_similarities: float = 0.0
    keep_share: float = 0.0
    blend: float = 1.0

    def __post_init__(self) -> None:
        _checks.check_in("(0, inf)", "learning_rate", self.learning_rate)
        for name in ("preserve_embeddings", "preserve_similarities"):
            _checks.check_in("[0, inf)", name, getattr(self, name))
        _checks.check_in("[0, 1)", "keep_share", self.keep_share)
        advice = "With 0 nothing would be learnt."
        _checks.check_in("(0, 1]", "blend", self.blend, advice=advice)
        for name in ("steps", "batch_size"):
            _checks.check_positive_int(name, getattr(self, name))
        if self.train_blocks is not None:
            _checks.check_count("train_blocks", self.train_blocks)
        if self.lora_rank is not None:
            _checks.check_positive_int("lora_rank", self.lora_rank)
        if self.keep_share and not self.preserve_embeddings:
            raise ValueError(
                f"`keep_share` {self.keep_share} would be ignored: images to keep count in what "
                "is preserved of embeddings alone. Set `preserve_embeddings`."
            )

    def to_dict(self) -> dict[str, Any]:
        """Its fields as JSON takes them, the loss as a description."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"loss": describe(self.loss or default_loss())}


def default_loss() -> AllPairsCosineLoss:
    """What served best in the measurements of the documentation."""
    return AllPairsCosineLoss(negatives="squared", positive_fraction=0.2)


def default_recipes(
    tower: VisionTower, *, batch_size: int = 256, keep_share: float = 0.0
) -> list[Recipe]:
    """A handful of recipes for a tower of its size, from the gentlest to the boldest.

    The weights of what is preserved, and the blend, are those that served a small tower best in
    the measurements of "Fine-tuning without forgetting"; for large ones the rate is what is
    customary for CLIP.

    Args:
        tower: The tower to fine-tune.
        batch_size: Images of a step.
        keep_share: Share of unlabelled images in a step, for those that preserve anything.

    Returns:
        The recipes, with different names. Those that train the last blocks alone are there for
        towers that have blocks.

    Example:
        >>> from pairclip.recipes import default_recipes
        >>> from pairclip.towers import random_tower
        >>> [recipe.name for recipe in default_recipes(random_tower())]
        ['last third', 'preserving', 'preserving, blended', 'plain, blended', 'plain']
    """
    tower = tower_of(tower)
    small = sum(parameter.numel() for parameter in tower.parameters()) < _SMALL
    rate = 6e-4 if small else 1e-5
    all_have: dict[str, Any] = {"learning_rate": rate, "batch_size": batch_size}
    preserving: dict[str, Any] = {
        **all_have,
        "preserve_embeddings": 0.15,
        "preserve_similarities": 0.35,
        "keep_share": keep_share,
    }
    recipes = [
        Recipe("preserving", **preserving),
        Recipe("preserving, blended", **preserving, blend=0.8),
        Recipe("plain, blended", **all_have, blend=0.5),
        Recipe("plain", **all_have),
    ]
    try:
        blocks = len(tower.blocks)
    except NotImplementedError:  # of a module whose parts aren't known
        return recipes
    last = Recipe("last third", **all_have, train_blocks=math.ceil(blocks / 3))
    return [last, *recipes]
