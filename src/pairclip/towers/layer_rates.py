"""A learning rate per layer, so that training keeps what early layers know."""

from __future__ import annotations

import math
from typing import Any

from pairclip import _checks
from pairclip.towers.vision_tower import VisionTower, tower_of


def layer_decay(
    tower: VisionTower, rate: float, decay: float, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls from the last layer to the first.

    Early layers hold what is general, so they are changed less. With L blocks, numbered 1 to L,
    block i gets ``rate * decay ** (L + 1 - i)``, what comes before the blocks (patch and position
    embeddings) ``rate * decay ** (L + 1)``, and what comes after them (a norm, and the
    projection or pooling head) the whole ``rate``.

    Args:
        tower: A tower with blocks, the head of a split one, or what PEFT made of it. Only its
            trainable parameters are in the groups, each once.
        rate: Learning rate of what comes after the last block.
        decay: Factor from one layer to the one before, in ``(0, 1]``; BEiT takes 0.65 to 0.85.
        weight_decay: Decay of weight matrices; biases, norms and other vectors get none, nor
            does what the model names in its ``no_weight_decay()``, as those of timm do.

    Returns:
        Groups for any optimizer, last layers first, with ``params``, ``lr``, ``weight_decay`` and
        a ``name`` such as ``"block 11, matrices"``.

    Raises:
        ValueError: If a number is out of range, or nothing is trainable.
        NotImplementedError: For a tower without blocks.

    Example:
        >>> import torch
        >>> from pairclip.towers import layer_decay, random_tower
        >>> tower = random_tower()
        >>> groups = layer_decay(tower, 1e-3, 0.5)
        >>> {group["name"].split(",")[0]: group["lr"] for group in groups}
        {'after': 0.001, 'block 2': 0.0005, 'block 1': 0.00025, 'before': 0.000125}
        >>> optimizer = torch.optim.AdamW(groups)

    References:
        Clark et al., ELECTRA, 2020 (https://arxiv.org/abs/2003.10555), and Bao et al., BEiT, 2021
        (https://arxiv.org/abs/2106.08254).
    """
    for name, value in (("rate", rate), ("decay", decay), ("weight_decay", weight_decay)):
        _checks.check_number(name, value)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"`rate` must be positive and finite, got {rate}.")
    if not 0 < decay <= 1:
        raise ValueError(f"`decay` must be in (0, 1], got {decay}. With 1 all rates are equal.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"`weight_decay` must be at least 0, got {weight_decay}.")
    tower = tower_of(tower)
    depths = tower._depths()
    after = len(tower.blocks) + 1
    undecayed = tower._no_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in tower.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, is_matrix = depths[name], parameter.ndim >= 2 and name not in undecayed
        place = {0: "before", after: "after"}.get(depth, f"block {depth}")
        group = groups.setdefault(
            (depth, is_matrix),
            {
                "params": [],
                "lr": rate * decay ** (after - depth),
                "weight_decay": weight_decay if is_matrix else 0.0,
                "name": f"{place}, {'matrices' if is_matrix else 'vectors'}",
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("`tower` has no trainable parameter: all have requires_grad=False.")
    return [groups[key] for key in sorted(groups, reverse=True)]
