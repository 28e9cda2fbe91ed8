"""Blends of the weights of two towers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip.towers import adapters
from pairclip.towers.vision_tower import Head, Trunk, VisionTower, tower_of


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
        ValueError: If `alpha` is out of range, the towers are of different architectures or
            preprocess images differently, or one is a trunk, or a head and the other is none.

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
    _checks.check_in("[0, 1]", "alpha", alpha)
    base, tuned = tower_of(base), tower_of(tuned)
    if isinstance(base, Head) and isinstance(tuned, Head):
        # Of the towers that they are of, so that the blend is a part of one, too.
        blend = interpolate(base._whole[0], tuned._whole[0], alpha)
        return blend.split(len(base.blocks))[1]
    if isinstance(base, (Head, Trunk)) or isinstance(tuned, (Head, Trunk)):
        raise ValueError("A trunk can't be blended, nor a head with a tower. Blend whole towers.")
    own, other = base._merged_weights(), tuned._merged_weights()
    _check_same_architecture(own, other)
    if base.settings() != tuned.settings():
        raise ValueError(
            "`base` and `tuned` have different settings or preprocess images differently, so no "
            f"blend fits both: {base.settings()} and {tuned.settings()}."
        )
    blend = copy.copy(base)
    blend.__dict__.update(vars(nn.Module()))  # with hooks of its own, too
    blend.model = copy.deepcopy(adapters.merged(base.model))
    for name, value in zip(own, blend.model.state_dict().values(), strict=True):
        value.copy_(_blended(own[name], other[name], alpha))
    blend.zero_grad()
    return blend.requires_grad_(True).eval()


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
