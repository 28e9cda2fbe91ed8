"""The pair loss with a soft label: a target similarity for each pair, from rows of targets.

With unit rows Z of the embeddings and U of the targets, ``S - T = Z Z' - U U'``, so the squares of
all its B x B entries sum up to ``|Z'Z|^2 - 2 |Z'U|^2 + |U'U|^2``. Four items by hand, whose targets
say two classes of two:

>>> z = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [1, 0]])
>>> u = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1.0]])
>>> (z @ z.T - u @ u.T).square().triu(1).sum()  # 1 + 0.36 + 1 + 0.64 + 0 + 0.16
tensor(3.1600)
>>> (z.T @ z).square().sum(), (z.T @ u).square().sum(), (u.T @ u).square().sum()
(tensor(8.7200), tensor(5.2000), tensor(8.))
>>> (8.72 - 2 * 5.2 + 8) / 2  # the diagonal of S - T is 0
3.16
>>> target_similarity_loss(z, u) * 6
tensor(3.1600)

The gradient in z_i is ``2 (Z'Z z_i - Z'U u_i)``, but for what is parallel to z_i.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip._vectors import unit_rows
from pairclip.losses.batch import UnitRows
from pairclip.losses.first_order import with_gradient

_SECOND_ORDER = "`target_similarity_loss` has no second derivatives."


def target_similarity_loss(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Bring the similarity of each pair to that of its targets: the pair loss with a soft label.

    This is the mean of ``(S - T)^2`` over the ``B (B - 1) / 2`` pairs of a batch, with the cosine
    similarities ``S`` of the embeddings and ``T`` of the targets. Targets may be several labels of
    an image (`multi_label_targets`), places in a tree of labels (`hierarchy_targets`), embeddings
    of the classes' names, or embeddings of the same images by another tower.

    It costs ``O(B (D + K)^2)`` at most, through second moments. The gradient is computed in the
    forward pass; second derivatives are not supported.

    Args:
        embeddings: Shape ``[B, D]``, floating point, of any length from 1e-37 to 1e38 (float64:
            1e-150 to 1e150). A zero row has similarity 0 with everything and gradient 0. Half
            precision is computed in float32.
        targets: Shape ``[B, K]``, numbers or bool, any length; constants. A zero row has
            target 0 with everything.

    Returns:
        A scalar; float32, or float64 for float64 embeddings. A batch without pairs gives 0.

    Raises:
        ValueError: If shapes don't fit, or `targets` requires a gradient.
        TypeError: If embeddings are not floating point or targets not numbers.
        RuntimeError: When differentiated twice.

    Example:
        >>> import torch
        >>> from pairclip import target_similarity_loss
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> target_similarity_loss(embeddings, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
        tensor(0.0115)

    References:
        Park et al. 2019, "Relational knowledge distillation"; Tung and Mori 2019,
        "Similarity-preserving knowledge distillation".
    """
    embeddings = _checks.as_embeddings("embeddings", embeddings)
    rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    targets = as_targets(targets, rows)

    def compute(rows: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        return _value_and_gradient(rows, targets, wanted)

    with torch.autocast(rows.device.type, enabled=False):
        return with_gradient(rows, compute, _SECOND_ORDER)


class TargetSimilarityLoss(nn.Module):
    """`target_similarity_loss` as a loss on ``(embeddings, labels, targets)``.

    The labels are not looked at: the targets say what is similar.

    Example:
        >>> import torch
        >>> from pairclip import TargetSimilarityLoss
        >>> loss = TargetSimilarityLoss()
        >>> loss(torch.eye(2), torch.tensor([0, 1]), torch.ones(2, 3))
        tensor(1.0000)
    """

    takes_targets = True

    def forward(self, embeddings: Tensor, labels: Tensor | None, targets: Tensor) -> Tensor:
        """See `target_similarity_loss`: ``[B, D]``, ``[B]`` and ``[B, K]`` give a scalar."""
        return target_similarity_loss(embeddings, targets)


def hierarchy_targets(
    paths: Sequence[Sequence[Hashable]], weights: Sequence[float] | None = None
) -> Tensor:
    """Targets from a tree of labels: two items are as similar as the levels that they share.

    The cosine of two rows is the sum of the weights of the levels down to which their paths are
    equal, over the sum of all weights.

    Args:
        paths: For each item, its labels from the top of the tree down, all equally many. Where
            items have a class, rows for the classes are enough: ``targets[labels]`` are those of
            the items.
        weights: What sharing each level is worth, positive; None is the same for all.

    Returns:
        Unit rows, float32 ``[N, K]``, with a column for each node of the tree.

    Raises:
        ValueError: If the paths are not equally long, or the weights don't fit them.
        TypeError: If a path is a string.

    Example:
        >>> from pairclip import hierarchy_targets
        >>> paths = [("animal", "dog"), ("animal", "cat"), ("tool", "saw")]
        >>> targets = hierarchy_targets(paths, weights=[1, 3])
        >>> targets @ targets.T
        tensor([[1.0000, 0.2500, 0.0000],
                [0.2500, 1.0000, 0.0000],
                [0.0000, 0.0000, 1.0000]])

    References:
        Barz and Denzler 2019, "Hierarchy-based image embeddings for semantic image retrieval".
    """
    _refuse_strings("paths", paths)
    depths = {len(path) for path in paths}
    if len(depths) != 1 or 0 in depths:
        raise ValueError(
            f"`paths` must have one and the same number of labels each, got {sorted(depths)}. "
            "Repeat the last label of the shorter ones."
        )
    (depth,) = depths
    shares = np.ones(depth) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (depth,) or not (np.isfinite(shares) & (shares > 0)).all():
        raise ValueError(
            f"`weights` must be {depth} positive numbers, one for each level, got {weights}."
        )
    levels = [[tuple(path[: level + 1]) for path in paths] for level in range(depth)]
    scales = np.sqrt(shares / shares.sum()).tolist()
    one_hot = [_many_hot([[node] for node in nodes]) for nodes in levels]
    return torch.cat([scale * hot for scale, hot in zip(scales, one_hot, strict=True)], dim=1)


def multi_label_targets(lists: Sequence[Iterable[Hashable]]) -> Tensor:
    """Targets from several labels of each item.

    The cosine of two rows is the number of labels that the items share, over the geometric mean of
    their numbers of labels.

    Args:
        lists: The labels of each item, names or ids.

    Returns:
        1 where an item has a label, else 0: float32 ``[N, K]`` for K labels, in the order in which
        they come up.

    Raises:
        TypeError: If the labels of an item are a string.

    Warns:
        UserWarning: With the number of items that have no label: they are similar to none.

    Example:
        >>> from pairclip import multi_label_targets
        >>> multi_label_targets([["dog", "grass"], ["dog"], ["cat", "sofa"]])
        tensor([[1., 1., 0., 0.],
                [1., 0., 0., 0.],
                [0., 0., 1., 1.]])
    """
    _refuse_strings("lists", lists)
    rows = _many_hot(lists)
    empty = int((rows == 0).all(dim=1).sum())
    if empty:
        warnings.warn(
            f"{empty} of {len(rows)} items have no label, so their targets are to be similar to "
            "nothing.",
            stacklevel=2,
        )
    return rows


def as_targets(targets: Any, rows: Tensor) -> Tensor:
    """Return `targets` as a tensor ``[B, K]`` like `rows`, or raise."""
    if isinstance(targets, np.ndarray):
        targets = torch.from_numpy(targets)
    if not isinstance(targets, Tensor) or targets.is_complex():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"`targets` must be a tensor or an array of numbers, got {kind}.")
    if targets.ndim != 2 or len(targets) != len(rows):
        raise ValueError(
            f"`targets` must have one row per embedding, shape [{len(rows)}, K], got "
            f"{list(targets.shape)}."
        )
    if targets.requires_grad:
        raise ValueError("`targets` requires a gradient, but gets none. Pass `targets.detach()`.")
    return targets.to(rows)


def _value_and_gradient(
    rows: Tensor, targets: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    if len(rows) < 2:
        return rows.new_zeros(()), torch.zeros_like(rows) if wanted else None
    vectors = UnitRows(rows)
    z, u = vectors.unit(), unit_rows(targets)
    size, width, depth = len(z), z.shape[1], u.shape[1]
    # Whichever has fewer multiplications; products of rows never where B > D + K.
    if size * (2 * width + depth) <= 2 * width * (width + depth) + depth**2:
        difference = (z @ z.T).addmm_(u, u.T, alpha=-1).fill_diagonal_(0)
        total = _squares(difference)
        toward = difference @ z if wanted else None
    else:
        of_rows, of_both = z.T @ z, z.T @ u
        total = _squares(of_rows) - 2 * _squares(of_both) + _squares(u.T @ u)
        # A zero row makes its place on the diagonal 1, which is no pair.
        total -= (vectors.nonzero != u.any(dim=1)).sum()
        toward = (z @ of_rows).addmm_(u, of_both.T, alpha=-1) if wanted else None
    pairs = size * (size - 1)
    value = (total / pairs).clamp_min(0).to(rows.dtype)
    if toward is None:
        return value, None
    del z, u
    toward.mul_(4 / pairs)
    return value, vectors.gradient(lambda piece: toward[piece], out=toward)


def _squares(matrix: Tensor) -> Tensor:
    return matrix.double().square().sum()


def _many_hot(lists: Sequence[Iterable[Hashable]]) -> Tensor:
    columns: dict[Hashable, int] = {}
    places = [
        (row, columns.setdefault(label, len(columns)))
        for row, labels in enumerate(lists)
        for label in labels
    ]
    hot = torch.zeros(len(lists), len(columns), dtype=torch.float32, device="cpu")
    if places:
        hot[tuple(torch.tensor(places, device="cpu").T)] = 1
    return hot


def _refuse_strings(name: str, values: Iterable[Any]) -> None:
    for number, labels in enumerate([values, *values]):
        if isinstance(labels, (str, bytes)):
            where = f"`{name}[{number - 1}]`" if number else f"`{name}`"
            raise TypeError(f"{where} must be a list of labels, got {labels!r}. Put it in a list.")
