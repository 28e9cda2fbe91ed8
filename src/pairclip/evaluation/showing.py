"""What pictures of an evaluation need, whoever draws them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from pairclip.datasets import LabelledImages
from pairclip.evaluation.result import Evaluation

# Metrics of the evaluations during training that pictures and pages show.
TRACKED = ("recall_at_1", "mean_average_precision", "gap")


class Hit(NamedTuple):
    """An image that a query found: its number, its class, its cosine, and whether it is right."""

    image: int
    class_name: str
    score: float
    is_right: bool

    @property
    def mark(self) -> str:
        """A sign that says the last without colour."""
        return "✓" if self.is_right else "✗"


class EvaluationImages(NamedTuple):
    """The images of an evaluation: those that are queries, and those that are searched."""

    queries: LabelledImages
    gallery: LabelledImages


def images_of(evaluation: Evaluation, dataset: Any, gallery: Any = None) -> EvaluationImages:
    """Open the datasets of an evaluation, or raise if they can't be those."""
    if (gallery is None) != (evaluation.gallery_labels is None):
        has = "no gallery" if gallery is None else "a gallery"
        raise ValueError(
            f"`gallery` must be there if the evaluation has one, and only then; got {has}."
        )
    queries = _opened("dataset", dataset, evaluation.labels)
    if evaluation.gallery_labels is None:
        return EvaluationImages(queries, queries)
    return EvaluationImages(queries, _opened("gallery", gallery, evaluation.gallery_labels))


def _opened(name: str, dataset: Any, labels: npt.NDArray[np.int64]) -> LabelledImages:
    images = LabelledImages(dataset)
    if images.of_features:
        raise ValueError(
            f"`{name}` must have images to show, got {type(dataset).__name__}. Give the dataset "
            "that the features were computed from."
        )
    if len(images) != len(labels):
        raise ValueError(
            f"`{name}` must be the evaluated one, got {len(images)} images for an evaluation of "
            f"{len(labels)}."
        )
    ids = images.labels.numpy()
    orders = [ids]
    if images.class_names is not None:  # joined classes are in the order of their names
        orders.append(np.argsort(np.argsort(images.class_names))[ids])
    others = min((np.flatnonzero(_ranks(each) != _ranks(labels)) for each in orders), key=len)
    if len(others):
        raise ValueError(
            f"`{name}` must be the evaluated one, but the classes of {len(others)} images "
            f"differ, first of image {others[0]}."
        )
    return images


def _ranks(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.unique(labels, return_inverse=True)[1]


def neighbor_is_right(evaluation: Evaluation) -> npt.NDArray[np.bool_]:
    """Whether each neighbour is of its query's class, ``[Q, K]``."""
    own = evaluation.labels[evaluation.queries]
    right: npt.NDArray[np.bool_] = _searched(evaluation)[evaluation.neighbors] == own[:, None]
    return right


def _searched(evaluation: Evaluation) -> npt.NDArray[np.int64]:
    """Class of each image that is searched."""
    labels = evaluation.gallery_labels
    return evaluation.labels if labels is None else labels


def hits(evaluation: Evaluation, row: int, k: int) -> list[Hit]:
    """The k nearest images of the query in a row of `Evaluation.queries`, as far as there are k."""
    own, classes = evaluation.labels[evaluation.queries[row]], _searched(evaluation)
    neighbors = zip(
        evaluation.neighbors[row, :k].tolist(),
        evaluation.neighbor_scores[row, :k].tolist(),
        strict=True,
    )
    return [
        Hit(image, evaluation.class_names[classes[image]], score, bool(classes[image] == own))
        for image, score in neighbors
    ]


def class_name(evaluation: Evaluation, image: int) -> str:
    """Name of the class of an image."""
    return evaluation.class_names[int(evaluation.labels[image])]


def file_name(images: LabelledImages, image: int) -> tuple[str, str | None]:
    """What an image is called where there is little room, and its whole path if it has one."""
    path = images.source.known_path(image)
    return (f"image {image}", None) if path is None else (os.path.basename(path), path)


class Alike(NamedTuple):
    """Two images of different classes that are more similar than others of these classes."""

    query: int
    neighbor: int
    classes: tuple[str, str]
    score: float


def alike(evaluation: Evaluation, count: int) -> list[Alike]:
    """The most similar images of the most confused classes, as far as one found the other."""
    own = evaluation.labels[evaluation.queries][:, None]
    theirs = _searched(evaluation)[evaluation.neighbors]
    pairs: list[Alike] = []
    for classes in (each[:2] for each in evaluation.confused_classes):
        one, other = (evaluation.class_names.index(name) for name in classes)
        between = ((own == one) & (theirs == other)) | ((own == other) & (theirs == one))
        if not between.any() or len(pairs) == count:
            continue
        scores = np.where(between, evaluation.neighbor_scores, -np.inf)
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        names = (int(own[row, 0]), int(theirs[row, column]))
        pairs.append(
            Alike(
                int(evaluation.queries[row]),
                int(evaluation.neighbors[row, column]),
                (evaluation.class_names[names[0]], evaluation.class_names[names[1]]),
                float(scores[row, column]),
            )
        )
    return pairs


def classes_in_turn(classes: npt.NDArray[np.int64], places: Sequence[int]) -> list[int]:
    """The places, in their order within a class, but with the classes taking turns."""
    turn_of: dict[int, int] = {}
    turns = []
    for place in places:
        turn = turn_of[int(classes[place])] = turn_of.get(int(classes[place]), -1) + 1
        turns.append(turn)
    return [places[i] for i in np.argsort(turns, kind="stable")]


class Density(NamedTuple):
    """Pairs over bins of similarity, as an area of 1: ends ``[bins + 1]``, heights ``[bins]``."""

    edges: npt.NDArray[np.float64]
    heights: npt.NDArray[np.float64]


def pair_densities(evaluation: Evaluation) -> dict[str, Density]:
    """Each kind of pair that is there as a density, in bins as wide as its number wants them.

    As counts the many pairs of different classes would hide the few of one class.
    """
    histogram = evaluation.histogram
    kinds = {"different": histogram.different, "same": histogram.same}
    return {
        kind: _density(histogram.edges, counts) for kind, counts in kinds.items() if counts.any()
    }


def _density(edges: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> Density:
    """Neighbouring bins joined to the width of Freedman and Diaconis, 1981, but at least 8."""
    total = int(counts.sum())
    filled = np.flatnonzero(counts)
    first, end = int(filled[0]), int(filled[-1]) + 1
    quarters = np.interp([0.25, 0.75], np.concatenate([[0.0], counts.cumsum() / total]), edges)
    width = 2 * float(np.ptp(quarters)) / total ** (1 / 3)
    joined = int(width / ((edges[-1] - edges[0]) / len(counts)))
    step = max(1, min(joined, (end - first) // 8))
    # What is left at the end goes to the last bin: a sliver would stand out as a peak.
    starts = first + step * np.arange(max(1, (end - first) // step))
    ends = edges[[*starts, end]]
    heights = np.add.reduceat(counts[:end], starts) / (total * np.diff(ends))
    return Density(ends, heights)


def pair_range(*evaluations: Evaluation) -> tuple[float, float]:
    """The similarities from the lowest to the highest pair of all, with a little room."""
    bounds = []
    for evaluation in evaluations:
        histogram = evaluation.histogram
        (filled,) = np.nonzero(histogram.same + histogram.different)
        bounds += [histogram.edges[filled[0]], histogram.edges[filled[-1] + 1]]
    room = 0.02 * (max(bounds) - min(bounds))
    return min(bounds) - room, max(bounds) + room


def with_clearest_classes(evaluations: Sequence[Evaluation]) -> int:
    """Which evaluation tells classes apart most, and so gives them an order that isn't noise."""
    spreads = []
    for evaluation in evaluations:
        apart = ~np.eye(len(evaluation.class_similarity), dtype=bool)
        values = evaluation.class_similarity[apart]
        spreads.append(float(values.std()) if len(values) else 0.0)
    return int(np.argmax(spreads))


def similarity_order(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rows of a class similarity matrix as a dendrogram has them, so that like classes meet.

    Average linkage of ``1 - similarity``, with the branches turned as Bar-Joseph, Gifford and
    Jaakkola do (2001, "Fast optimal leaf ordering for hierarchical clustering"). The diagonal
    does not matter.
    """
    if len(similarity) < 3:
        return np.arange(len(similarity))
    distances = 1 - (similarity + similarity.T) / 2
    np.fill_diagonal(distances, 0)
    condensed = squareform(distances.clip(min=0), checks=False)
    return leaves_list(linkage(condensed, "average", optimal_ordering=True)).astype(np.int64)
