"""How well a tower, or the embeddings that it made, keep classes apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from pairclip import _checks
from pairclip._vectors import group_by_slot, unit_rows
from pairclip.datasets import LabelledImages
from pairclip.embedding import embed_images
from pairclip.evaluation.classes import class_means, confused_classes, names_of
from pairclip.evaluation.histogram import PairHistogram
from pairclip.evaluation.joining import column_of, groups_of, joined_labels
from pairclip.evaluation.result import Evaluation
from pairclip.retrieval import PAIR_METRICS, QUERY_METRICS, PairSeparation, outcome_of
from pairclip.similarity import totals_of
from pairclip.towers import VisionTower

_NEIGHBORS = 10


def evaluate(
    tower: VisionTower,
    queries: Any,
    gallery: Any = None,
    *,
    exclude: str | Sequence[Any] | tuple[Sequence[Any], Sequence[Any]] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    also: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Embed a labelled dataset and say how well the embeddings keep its classes apart.

    Under several processes each embeds a part, as `embed_images` says: let all of them call it.

    Args:
        tower: Embeds the images.
        queries: Any labelled dataset that `LabelledImages` takes.
        gallery: The images that are searched, another such dataset; None searches each of
            `queries` among the others. Classes are joined by name where both have names. Images of
            further classes are what must not be found.
        exclude: A value of each image (its camera, product or photograph): an image of a query's
            own class *and* value is neither a find nor a miss, so that near copies don't count.
            A sequence, or the name of a column of the dataset; for a gallery the name of a column
            that both have, or a pair of sequences, of the queries and of the gallery. None, NaN
            or an empty text stands for an image like no other.
        batch_size: Images per forward pass.
        num_workers: Processes that load and preprocess images.
        also: Further datasets by name, evaluated apart, each among its own images: what the tower
            must not forget, for instance, or classes that it wasn't trained on.

    Returns:
        The metrics, of each query among the others or in the gallery.

    Raises:
        ValueError: If an image can't be read, an embedding is not finite, no query has another
            image of its class to find, only one dataset has class names, or `exclude` doesn't fit.
        RuntimeError: If another process failed, was ended or did not call it.

    Example:
        >>> import numpy as np
        >>> from pairclip import evaluate
        >>> from pairclip.towers import random_tower
        >>> images = np.zeros((4, 16, 16, 3), dtype=np.uint8)
        >>> images[2:] = 255
        >>> names = ["black", "black", "white", "white"]
        >>> evaluate(random_tower(), (images, names)).recall_at_1
        1.0
        >>> evaluate(random_tower(), (images[1:3], names[1:3]), gallery=(images, names)).recall_at_1
        1.0
    """
    if also is not None and not isinstance(also, Mapping):
        raise TypeError(f"`also` must be a dict of datasets by name, got {type(also).__name__}.")
    data = LabelledImages(queries)
    unreadable = [*data.unreadable]

    def embed(images: LabelledImages) -> Tensor:
        return embed_images(tower, images, batch_size=batch_size, num_workers=num_workers)

    if gallery is None:
        values = None if exclude is None else column_of("exclude", exclude, data, "queries")
        evaluation = evaluate_embeddings(
            embed(data), data.labels, class_names=data.class_names, exclude=values
        )
    else:
        images = LabelledImages(gallery)
        unreadable += images.unreadable
        query_labels, labels, class_names = joined_labels(data, images)
        of_queries = of_gallery = None
        if exclude is not None:
            both = (exclude, exclude) if isinstance(exclude, str) else _pair(exclude)
            of_queries = column_of("exclude", both[0], data, "queries")
            of_gallery = column_of("exclude", both[1], images, "gallery")
        evaluation = evaluate_embeddings(
            embed(images),
            labels,
            queries=embed(data),
            query_labels=query_labels,
            class_names=class_names,
            exclude=of_gallery,
            query_exclude=of_queries,
        )
    return replace(
        evaluation,
        unreadable=unreadable,
        also={
            name: evaluate(tower, other, batch_size=batch_size, num_workers=num_workers)
            for name, other in (also or {}).items()
        },
    )


def evaluate_embeddings(
    embeddings: Any,
    labels: Any,
    *,
    queries: Any = None,
    query_labels: Any = None,
    class_names: list[str] | None = None,
    exclude: Sequence[Any] | None = None,
    query_exclude: Sequence[Any] | None = None,
) -> Evaluation:
    """Say how well embeddings keep their classes apart.

    Args:
        embeddings: The images to search, shape ``[N, D]``, floating point, any length.
        labels: Class id of each row, shape ``[N]``, integer.
        queries: Shape ``[M, D]``; None takes each row as a query among the others.
        query_labels: Class id of each query, shape ``[M]``.
        class_names: Name of class id i at place i; None names classes by their ids. Where two
            have one name, the ids are added.
        exclude: A value of each row: a row of a query's own class *and* value is neither a find
            nor a miss, so that near copies don't count. None, NaN or an empty text stands for a
            row like no other.
        query_exclude: The same of each query, where there are `queries`.

    Returns:
        The metrics, of each row among the others or of each query among the rows.

    Raises:
        ValueError: If shapes don't fit, an embedding is not finite, a class has no name, or no
            query has another row of its class to find.
        TypeError: If embeddings are not floating point or labels not integers.

    Warns:
        UserWarning: If queries were left out because no other row is of their class.

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
    labels = _checks.as_labels("labels", labels, length=len(embeddings)).to(embeddings.device)
    groups, query_groups = _groups(exclude, query_exclude, embeddings, queries)
    outcome = outcome_of(
        [*QUERY_METRICS.values()],
        embeddings,
        labels,
        queries=queries,
        query_labels=query_labels,
        groups=groups,
        query_groups=query_groups,
        neighbors=_NEIGHBORS,
    )
    rows = unit_rows(embeddings)
    if queries is not None:
        query_rows = unit_rows(_checks.as_embeddings("queries", queries)).to(rows)
        rows = torch.cat([query_rows, rows])
        labels = torch.cat([_checks.as_labels("query_labels", query_labels).to(labels), labels])
    ids, places = labels.unique(return_inverse=True)
    names = names_of(ids.tolist(), class_names)
    totals = totals_of(rows, group_by_slot(places, len(ids)))
    gallery_labels = None
    if queries is not None:
        places, gallery = places.split([len(queries), len(embeddings)])
        gallery_labels = gallery.cpu().numpy()
    per_query = {name: values.cpu().numpy() for name, values in outcome.per_query.items()}
    of_query = places[outcome.queries].cpu().numpy()
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
        num_images=len(places),
        num_queries=len(outcome.queries),
        class_names=names,
        confused_classes=confused_classes(totals, names),
        per_class={
            key: class_means(values, of_query, len(names)) for key, values in per_query.items()
        },
        labels=places.cpu().numpy(),
        queries=outcome.queries.cpu().numpy(),
        per_query=per_query,
        neighbors=outcome.neighbors.cpu().numpy(),
        neighbor_scores=outcome.neighbor_scores.cpu().numpy(),
        histogram=PairHistogram(*(each.cpu().numpy() for each in outcome.histogram or ())),
        class_pairs=type(totals)(*(each.cpu() for each in totals)),
        gallery_labels=gallery_labels,
    )


def _pair(exclude: Any) -> tuple[Any, Any]:
    if not isinstance(exclude, tuple) or len(exclude) != 2:
        raise ValueError(
            "`exclude` must be the name of a column or a pair of sequences, of the queries and of "
            f"the gallery, got {type(exclude).__name__}."
        )
    return exclude


def _groups(
    exclude: Sequence[Any] | None,
    query_exclude: Sequence[Any] | None,
    embeddings: Tensor,
    queries: Any,
) -> tuple[Tensor | None, Tensor | None]:
    if (query_exclude is None) != (exclude is None or queries is None):
        raise ValueError(
            "`exclude` and `query_exclude` go together where there are `queries`, and "
            "`query_exclude` needs them."
        )
    if exclude is None:
        return None, None
    for name, values, of in (
        ("exclude", exclude, embeddings),
        ("query_exclude", query_exclude, queries),
    ):
        if values is not None and len(values) != len(of):
            raise ValueError(
                f"`{name}` must have one value for each row, got {len(values)} for {len(of)} rows."
            )
    if query_exclude is None:
        return groups_of(exclude)[0], None
    of_queries, of_rows = groups_of(query_exclude, exclude)
    return of_rows, of_queries
