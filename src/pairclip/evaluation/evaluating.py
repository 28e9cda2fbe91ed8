"""How well a tower, or the embeddings that it made, keep classes apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from pairclip import _checks
from pairclip.datasets import LabelledImages
from pairclip.embedding import embed_images
from pairclip.evaluation.result import Evaluation, FloatArray, IntArray, PairHistogram
from pairclip.retrieval import PAIR_METRICS, QUERY_METRICS, PairSeparation, outcome_of
from pairclip.similarity import class_similarity_matrix
from pairclip.towers import VisionTower

_NEIGHBORS = 10
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
        The metrics, each image searched among the others.

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
        The metrics, each row searched among the others.

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
        >>> evaluation = evaluate_embeddings(embeddings, torch.tensor([0, 0, 1, 1]))
        >>> evaluation.recall_at_1, evaluation.confused_classes[0][:2]
        (1.0, ('0', '1'))
        >>> evaluation.to_markdown().splitlines()[2]
        '| Recall at 1 | 1.000 |'
    """
    embeddings = _checks.as_embeddings("embeddings", embeddings)
    labels = _checks.as_labels("labels", labels, length=len(embeddings))
    names = _names(labels.unique().tolist(), class_names)
    outcome = outcome_of([*QUERY_METRICS.values()], embeddings, labels, neighbors=_NEIGHBORS)
    similarity, classes = class_similarity_matrix(embeddings, labels)
    matrix = similarity.cpu().numpy()
    places = torch.searchsorted(classes, labels.to(classes.device)).cpu().numpy()
    per_query = {name: values.cpu().numpy() for name, values in outcome.per_query.items()}
    queries = outcome.queries.cpu().numpy()
    of_query = places[queries]
    pairs = cast(PairSeparation, outcome.separation)
    metrics: dict[str, Any] = {
        **{name: float(values.mean()) for name, values in per_query.items()},
        **{name: metric.function(pairs) for name, metric in PAIR_METRICS.items()},
    }
    return Evaluation(
        **metrics,
        roc_auc_error=pairs.roc_auc_error,
        pair_average_precision_error=pairs.average_precision_error,
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
        neighbors=outcome.neighbors.cpu().numpy(),
        neighbor_scores=outcome.neighbor_scores.cpu().numpy(),
        histogram=PairHistogram(*(each.cpu().numpy() for each in outcome.histogram or ())),
    )


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
