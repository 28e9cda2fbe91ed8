"""How well embeddings keep classes apart: figures before and after, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from pairclip import _checks
from pairclip._figures import QUERY_TITLES, Change
from pairclip._results import Evaluation, FloatArray, IntArray, PairHistogram
from pairclip.datasets import LabelledImages
from pairclip.embedding import embed_images
from pairclip.retrieval import Figures, PairSeparation, all_figures
from pairclip.similarity import class_similarity_matrix
from pairclip.towers import VisionTower

__all__ = ["Change", "Evaluation", "PairHistogram", "evaluate", "evaluate_embeddings"]

_NEIGHBORS = 5
_MOST_CONFUSED = 5


def evaluate(
    tower: VisionTower,
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    also: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Embed a labelled dataset and say how well the embeddings keep its classes apart.

    Args:
        tower: Embeds the images.
        dataset: Any labelled dataset that `LabelledImages` takes.
        batch_size: Images per forward pass.
        num_workers: Processes that load and preprocess images.
        also: Further datasets by name, evaluated apart: what the tower must not forget, for
            instance, or classes that it wasn't trained on.

    Returns:
        The figures, each image searched among the others.

    Raises:
        ValueError: If an image can't be read, an embedding is not finite, or no class has two
            images.

    Example:
        >>> import numpy as np
        >>> from pairclip import evaluate
        >>> from pairclip.towers import random_tower
        >>> tower = random_tower()
        >>> images = np.zeros((4, 16, 16, 3), dtype=np.uint8)
        >>> images[2:] = 255
        >>> evaluate(tower, (images, ["black", "black", "white", "white"])).recall_at_1
        1.0
    """
    if also is not None and not isinstance(also, Mapping):
        raise TypeError(f"`also` must be a dict of datasets by name, got {type(also).__name__}.")
    data = LabelledImages(dataset)
    embeddings = embed_images(tower, data, batch_size=batch_size, num_workers=num_workers)
    return replace(
        evaluate_embeddings(embeddings, data.labels, class_names=data.class_names),
        also={
            name: evaluate(tower, other, batch_size=batch_size, num_workers=num_workers)
            for name, other in (also or {}).items()
        },
    )


def evaluate_embeddings(
    embeddings: Any, labels: Any, *, class_names: list[str] | None = None
) -> Evaluation:
    """Say how well embeddings keep their classes apart.

    Args:
        embeddings: Shape ``[N, D]``, floating point, any length.
        labels: Class id of each row, shape ``[N]``, integer.
        class_names: Name of class id i at place i; None names classes by their ids. Where two
            have one name, the ids are added.

    Returns:
        The figures, each row searched among the others.

    Raises:
        ValueError: If shapes don't fit, an embedding is not finite, a class has no name, or no
            class has two rows.
        TypeError: If embeddings are not floating point or labels not integers.

    Warns:
        UserWarning: If rows were left out as queries because they are alone in their class.

    Example:
        >>> import torch
        >>> from pairclip import evaluate_embeddings
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> found = evaluate_embeddings(embeddings, torch.tensor([0, 0, 1, 1]))
        >>> found.recall_at_1, found.confused_classes[0][:2]
        (1.0, ('0', '1'))
        >>> found.to_markdown().splitlines()[2]
        '| Recall at 1 | 1.000 |'
    """
    embeddings = _checks.as_embeddings("embeddings", embeddings)
    labels = _checks.as_labels("labels", labels, length=len(embeddings))
    names = _names(labels.unique().tolist(), class_names)
    found = all_figures(embeddings, labels, ks=(1, 5, 10), knn=_NEIGHBORS, neighbors=10)
    similarity, classes = class_similarity_matrix(embeddings, labels)
    matrix = similarity.cpu().numpy()
    places = torch.searchsorted(classes, labels.to(classes.device)).cpu().numpy()
    per_query = _figures_of_queries(found)
    means: dict[str, Any] = {key: float(values.mean()) for key, values in per_query.items()}
    queries = found.queries.cpu().numpy()
    of_query = places[queries]
    pairs = cast(PairSeparation, found.separation)
    return Evaluation(
        **means,
        same_mean=pairs.same_mean,
        same_std=pairs.same_std,
        different_mean=pairs.different_mean,
        different_std=pairs.different_std,
        gap=pairs.gap,
        roc_auc=pairs.roc_auc,
        roc_auc_error=pairs.roc_auc_error,
        pair_average_precision=pairs.average_precision,
        pair_average_precision_error=pairs.average_precision_error,
        best_threshold=pairs.best_threshold,
        balanced_accuracy=pairs.balanced_accuracy,
        balanced_accuracy_error=pairs.balanced_accuracy_error,
        num_images=len(embeddings),
        num_queries=len(queries),
        class_similarity=matrix,
        class_names=names,
        confused_classes=_confused(matrix, names),
        per_class={
            key: _class_means(values, of_query, len(names)) for key, values in per_query.items()
        },
        labels=places,
        queries=queries,
        per_query=per_query,
        neighbors=found.neighbors.cpu().numpy(),
        neighbor_scores=found.neighbor_scores.cpu().numpy(),
        histogram=PairHistogram(*(each.cpu().numpy() for each in found.histogram or ())),
    )


def _figures_of_queries(found: Figures) -> dict[str, FloatArray]:
    columns = [
        *found.recall.unbind(1),
        found.precision[:, 2],
        found.r_precision,
        found.map_at_r,
        found.average_precision,
        found.knn_correct,
    ]
    return {
        key: column.cpu().numpy().copy() for key, column in zip(QUERY_TITLES, columns, strict=True)
    }


def _class_means(values: FloatArray, classes: IntArray, count: int) -> FloatArray:
    queries = np.bincount(classes, minlength=count)
    sums = np.bincount(classes, weights=values, minlength=count)
    means: FloatArray = np.divide(sums, queries, out=np.full(count, np.nan), where=queries > 0)
    return means


def _names(classes: list[int], class_names: list[str] | None) -> list[str]:
    if class_names is None:
        return [str(of_class) for of_class in classes]
    for of_class in classes:
        if not 0 <= of_class < len(class_names):
            raise ValueError(
                f"`class_names` has {len(class_names)} names, but there is a class id {of_class}. "
                "Give one name for each id from 0 to the highest, or None."
            )
    names = [class_names[of_class] for of_class in classes]
    of_name = Counter(names)
    return [
        name if of_name[name] == 1 else f"{name} ({of_class})"
        for name, of_class in zip(names, classes, strict=True)
    ]


def _confused(matrix: FloatArray, names: list[str]) -> list[tuple[str, str, float]]:
    above = np.triu(np.ones(matrix.shape, dtype=bool), 1)
    values = matrix[above]
    if not len(values):
        return []
    # Not all are sorted: of ten thousand classes there are fifty million pairs.
    count = min(_MOST_CONFUSED, len(values))
    rows, columns = np.nonzero(above & (matrix >= np.partition(values, -count)[-count]))
    values = matrix[rows, columns]
    most = np.argsort(-values, kind="stable")[:count]
    return [(names[rows[i]], names[columns[i]], float(values[i])) for i in most]
