"""What in a collection a person should look at: images that are there twice, doubtful labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairclip import _checks
from pairclip._vectors import unit_rows
from pairclip.similarity import nearest_neighbors

_REGULARISATION = (1e-3, 1e-2, 1e-1, 1.0)
# Predictions that are held at once, which bounds the memory whatever the number of classes.
_VALUES = 1 << 23


class Suspicion(NamedTuple):
    """How doubtful each label is, and what it might be instead.

    Attributes:
        scores: How much better another class fits than the image's own, float64 ``[N]``; above 0
            another one does, and about 1 is as clear as it gets.
        classes: That other class's id, int64 ``[N]``.
    """

    scores: Tensor
    classes: Tensor


def suspect_labels(embeddings: Any, labels: Any) -> Suspicion:
    """Say for each image how much better another class fits it than its own.

    A ridge regression from embeddings to classes, weighted so that each class counts alike,
    predicts every image from all others (leave one out, in closed form): no image is judged by a
    model that has seen its own label. The strength of the ridge is the one of a few that predicts
    best so.

    Args:
        embeddings: Shape ``[N, D]``, floating point, any length; N may be below D.
        labels: Class id of each row, shape ``[N]``, integer; at least two classes.

    Returns:
        Scores and the better classes.

    Raises:
        ValueError: If shapes don't fit, an embedding is not finite, or there is one class alone.

    References:
        Allen 1974, "The relationship between variable selection and data augmentation and a method
        for prediction" (leave-one-out residuals of ridge regression, PRESS).

    Example:
        >>> import torch
        >>> from pairclip.evaluation import suspect_labels
        >>> generator = torch.Generator().manual_seed(0)
        >>> embeddings = torch.eye(4)[[0] * 8 + [1] * 8]
        >>> embeddings = embeddings + 0.1 * torch.randn(16, 4, generator=generator)
        >>> suspicion = suspect_labels(embeddings, [0] * 7 + [1] * 9)
        >>> int(suspicion.scores.argmax()), int(suspicion.classes[7])
        (7, 0)
    """
    rows = _checks.as_embeddings("embeddings", embeddings, finite=True)
    ids = _checks.as_labels("labels", labels, length=len(rows)).cpu()
    classes, places, counts = ids.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"`labels` must have at least two classes, got {len(classes)}.")
    inputs = unit_rows(rows).double().cpu()
    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    weights = (len(places) / (len(classes) * counts.double()))[places].sqrt()[:, None]
    predictions = (_left_out(inputs * weights, weights, places, r) for r in _REGULARISATION)
    _, scores, others = min(predictions, key=lambda prediction: prediction[0])
    return Suspicion(scores, classes[others])


def near_duplicates(
    embeddings: Any, *, min_score: float = 0.98, k: int = 10
) -> list[tuple[int, int, float]]:
    """List the pairs of rows that are almost the same.

    Args:
        embeddings: Shape ``[N, D]``, floating point: of a tower, or the pixels of small copies.
        min_score: The lowest cosine of a pair, in ``[-1, 1]``.
        k: How many of each row's nearest are looked at.

    Returns:
        First row, second row and cosine of each pair, the most similar pair first.

    Raises:
        ValueError: If `min_score` is out of range, or an embedding is not finite.

    Example:
        >>> import torch
        >>> from pairclip.evaluation import near_duplicates
        >>> near_duplicates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
        [(0, 2, 1.0)]
    """
    rows = _checks.as_embeddings("embeddings", embeddings, finite=True)
    _checks.check_in("[-1, 1]", "min_score", min_score)
    if len(rows) < 2:
        return []
    scores, others = nearest_neighbors(rows, k=min(k, len(rows) - 1))
    pairs = {}
    for row, column in (scores >= min_score).nonzero().tolist():
        pair = tuple(sorted((row, int(others[row, column]))))
        pairs[pair] = min(float(scores[row, column]), 1.0)
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [(first, second, score) for (first, second), score in ranked]


def _left_out(
    inputs: Tensor, weights: Tensor, places: Tensor, ridge: float
) -> tuple[float, Tensor, Tensor]:
    """What a ridge regression from weighted rows to classes predicts for each from all others.

    Returns:
        Its squared error; by how much it prefers the best of the other classes to a row's own,
        ``[N]``; and that class, ``[N]``.
    """
    strength = ridge * float(inputs.square().sum()) / inputs.shape[1]
    gram = inputs.T @ inputs
    gram.diagonal().add_(strength)
    solved = torch.linalg.solve(gram, inputs.T).T
    leverage = (inputs * solved).sum(dim=1, keepdim=True)
    classes = int(places.max()) + 1
    coefficients = solved.new_zeros(classes, inputs.shape[1])
    coefficients.index_add_(0, places, solved * weights)
    error, scores, others = 0.0, [], []
    for rows in torch.arange(len(inputs), device="cpu").split(max(1, _VALUES // classes)):
        own, weight, lever = places[rows, None], weights[rows], leverage[rows]
        predicted = inputs[rows] @ coefficients.T
        predicted.scatter_add_(1, own, -lever * weight).div_(1 - lever)
        of_own = predicted.gather(1, own)
        error += float(predicted.scatter_add(1, own, -weight).square().sum())
        best = predicted.scatter_(1, own, -torch.inf).max(dim=1)
        scores.append((best.values - of_own[:, 0]) / weight[:, 0])
        others.append(best.indices)
    return error, torch.cat(scores), torch.cat(others)
