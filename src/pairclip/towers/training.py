"""Training that keeps what a tower knew: a rate per layer, and blends of weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from pairclip import _checks
from pairclip.towers import adapters
from pairclip.towers.base import VisionTower, tower_of


def layer_decay(
    tower: VisionTower, rate: float, decay: float, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls from the last layer to the first.

    Early layers hold what is general, so they are changed less. With L blocks, numbered 1 to L,
    block i gets ``rate * decay ** (L + 1 - i)``, what comes before the blocks (patch and position
    embeddings) ``rate * decay ** (L + 1)``, and what comes after them (a norm, and the
    projection or pooling head) the whole ``rate``.

    Args:
        tower: A CLIP or SigLIP tower, the head of a split one, or what PEFT made of it. Only its
            trainable parameters are in the groups, each once.
        rate: Learning rate of what comes after the last block.
        decay: Factor from one layer to the one before, in ``(0, 1]``; BEiT takes 0.65 to 0.85.
        weight_decay: Decay of weight matrices; biases, norms and other vectors get none.

    Returns:
        Groups for any optimizer, last layers first, with ``params``, ``lr``, ``weight_decay`` and
        a ``name`` such as ``"block 11, matrices"``.

    Raises:
        ValueError: If a number is out of range, or nothing is trainable.
        NotImplementedError: For a tower that is neither CLIP nor SigLIP.

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
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in tower.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, is_matrix = depths[name], parameter.ndim >= 2
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


def interpolate(base: VisionTower, tuned: VisionTower, alpha: float) -> VisionTower:
    """Blend the weights of a tower before and after fine-tuning.

    Between the two there often is a tower that is nearly as good as the tuned one on its own
    images, and nearly as good as the base on all others. Adapters of PEFT count as merged.

    Args:
        base: The tower before.
        tuned: The tower after, fine-tuned from `base`.
        alpha: Share of `tuned`, in ``[0, 1]``: 0 gives the weights of `base`, 1 of `tuned`.

    Returns:
        A new tower in evaluation mode, where `base` is, with its weights' types; computed in
        float32 at least. Neither `base` nor `tuned` is changed.

    Raises:
        ValueError: If `alpha` is out of range, or the towers are of different architectures or
            preprocess images differently.

    Example:
        >>> import copy
        >>> import torch
        >>> from pairclip.towers import interpolate, random_tower
        >>> base = random_tower()
        >>> tuned = copy.deepcopy(base)
        >>> _ = torch.nn.init.ones_(tuned.model.visual_projection.weight)
        >>> _ = torch.nn.init.zeros_(base.model.visual_projection.weight)
        >>> interpolate(base, tuned, 0.25).model.visual_projection.weight[0, :3].tolist()
        [0.25, 0.25, 0.25]

    References:
        Wortsman et al., Robust fine-tuning of zero-shot models, 2022
        (https://arxiv.org/abs/2109.01903).
    """
    _checks.check_fraction("alpha", alpha)
    base, tuned = tower_of(base), tower_of(tuned)
    own, other = base._merged_weights(), tuned._merged_weights()
    _check_same_architecture(own, other)
    if base.settings() != tuned.settings():
        raise ValueError(
            "`base` and `tuned` have different settings or preprocess images differently, so no "
            f"blend fits both: {base.settings()} and {tuned.settings()}."
        )
    blend = copy.copy(base)
    blend._modules = {"model": copy.deepcopy(adapters.merged(base.model))}
    for name, value in zip(own, blend.model.state_dict().values(), strict=True):
        value.copy_(_blended(own[name], other[name], alpha))
    for parameter in blend.parameters():
        parameter.grad = None
        parameter.requires_grad = True
    return blend.eval()


def _blended(own: Tensor, other: Tensor, alpha: float) -> Tensor:
    other = other.to(own.device)
    if not own.is_floating_point():  # a count, say, has no values in between
        return other if alpha > 0 else own
    precise = torch.promote_types(own.dtype, torch.float32)
    return torch.lerp(own.to(precise), other.to(precise), alpha)


def _check_same_architecture(own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in own | other:
        shapes = [list(w[name].shape) if name in w else "none" for w in (own, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "`base` and `tuned` must be of one architecture, but the first parameter that "
                f"differs, `{name}`, is {shapes[0]} in `base` and {shapes[1]} in `tuned`. Blend a "
                "tower with what was fine-tuned from it."
            )
