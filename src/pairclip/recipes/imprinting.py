"""Proxies that start at the mean of their class."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip._vectors import unit_rows
from pairclip.datasets import LabelledImages
from pairclip.embedding import embed
from pairclip.towers import VisionTower

_Loss = TypeVar("_Loss", bound=nn.Module)
# What pytorch-metric-learning's losses call their weights, and whether a proxy is a column.
_IS_COLUMN = {"W": True, "fc": True, "proxies": False}


def imprint(
    loss: _Loss,
    tower: VisionTower,
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> _Loss:
    """Put class means of the embeddings into the weights of a proxy loss, before training.

    A proxy loss learns a vector for each class, which it starts at random; the first steps then
    pull the tower towards chance. Each proxy gets the direction of its class's mean unit embedding,
    and keeps its length. Where a class has several centres, its images are divided among them at
    random.

    Args:
        loss: A loss of pytorch-metric-learning with the weights ``W`` (ArcFace, CosFace,
            NormalizedSoftmax, SubCenterArcFace, ...), ``fc`` (SoftTriple) or ``proxies``
            (ProxyAnchor, ProxyNCA), or a module that holds one. Its weights are changed.
        tower: Embeds the images; not changed.
        dataset: What the tower will be trained on: class ids count the proxies from 0. Images with
            a negative label are left out.
        batch_size: Images per forward pass.
        num_workers: Processes that load images.
        seed: Decides which images go to which of several centres.

    Returns:
        `loss` itself.

    Raises:
        TypeError: If `loss` holds no proxies, or several losses that do.
        ValueError: If their size is not the tower's, or a class id has no proxy.

    Warns:
        UserWarning: With the number of proxies whose class has no image; they stay as they are.

    Example:
        >>> import numpy as np
        >>> from pytorch_metric_learning.losses import ProxyAnchorLoss
        >>> from pairclip import imprint
        >>> from pairclip.towers import random_tower
        >>> images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
        >>> tower = random_tower(embedding_dim=8)
        >>> loss = imprint(ProxyAnchorLoss(2, 8), tower, (images, [0, 0, 1, 1]))

    References:
        Qi, Brown and Lowe 2018, "Low-shot learning with imprinted weights".
    """
    _checks.check_count("seed", seed)
    owner, weight, is_column = _weight_of(loss)
    images = LabelledImages(dataset)
    labels = images.labels
    embeddings = embed(tower, images, batch_size=batch_size, num_workers=num_workers)
    embeddings, labels = embeddings[labels >= 0], labels[labels >= 0]
    proxies = weight.data.T if is_column else weight.data
    num_proxies, width = proxies.shape
    if width != embeddings.shape[1]:
        raise ValueError(
            f"`loss` has proxies of size {width}, but `tower` makes embeddings of size "
            f"{embeddings.shape[1]}. Make {type(owner).__name__} with embedding_size="
            f"{embeddings.shape[1]}."
        )
    # Those of a class follow each other.
    centres = int(getattr(owner, "centers_per_class", getattr(owner, "sub_centers", 1)))
    num_classes = num_proxies // centres
    if len(labels) and int(labels.max()) >= num_classes:
        raise ValueError(
            f"`dataset` has the class id {int(labels.max())}, but `loss` has proxies for "
            f"{num_classes} classes, ids 0 to {num_classes - 1}."
        )
    means, is_there = _directions(embeddings, labels, num_classes, centres, seed)
    missing = num_classes - int(is_there.view(num_classes, centres)[:, 0].sum())
    if missing:
        warnings.warn(
            f"{missing} of {num_classes} classes have no image in `dataset`, so their proxies stay "
            "as they are.",
            stacklevel=2,
        )
    is_there = is_there.to(proxies.device)
    lengths = proxies.norm(dim=1, keepdim=True)
    # The transposed view writes into the weight.
    proxies[is_there] = (means.to(proxies) * lengths)[is_there]
    return loss


def _weight_of(loss: nn.Module) -> tuple[nn.Module, nn.Parameter, bool]:
    """The module with the proxies, these, and whether each is a column."""
    modules = loss.modules() if isinstance(loss, nn.Module) else []
    weights = [
        (module, weight, is_column)
        for module in modules
        for name, is_column in _IS_COLUMN.items()
        if isinstance(weight := module._parameters.get(name), nn.Parameter) and weight.ndim == 2
    ]
    if len(weights) != 1:
        several = f"{len(weights)} of them" if weights else "none"
        raise TypeError(
            "`loss` must hold one loss with proxies, a parameter `W`, `fc` or `proxies` as "
            f"pytorch-metric-learning calls them, got {several} in {type(loss).__name__}."
        )
    return weights[0]


def _directions(
    embeddings: Tensor, labels: Tensor, num_classes: int, centres: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Unit mean of each proxy's images, ``[C * K, D]``, and whether it has any, ``[C * K]``."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator, device="cpu")
    rows = unit_rows(embeddings)[shuffled[labels[shuffled].argsort(stable=True)]].double()
    counts = labels.bincount(minlength=num_classes)
    sums = rows.new_zeros(num_classes, centres, rows.shape[1])
    for of_class, own in zip(sums, rows.split(counts.tolist()), strict=True):
        for number in range(centres if len(own) else 0):
            # A class of fewer images than centres repeats them.
            of_class[number] = own[number % len(own) :: centres].sum(dim=0)
    return unit_rows(sums.flatten(0, 1)), (counts > 0).repeat_interleave(centres)
