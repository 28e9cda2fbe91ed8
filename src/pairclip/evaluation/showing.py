"""What pictures of an evaluation need, whoever draws them."""

from __future__ import annotations

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


def images_of(evaluation: Evaluation, dataset: Any) -> LabelledImages:
    """Open the dataset of an evaluation, or raise if it can't be that one."""
    images = LabelledImages(dataset)
    if images.of_features:
        raise ValueError(
            f"`dataset` must have images to show, got {type(dataset).__name__}. Give the dataset "
            "that the features were computed from."
        )
    if len(images) != evaluation.num_images:
        raise ValueError(
            f"`dataset` must be the evaluated one, got {len(images)} images for an evaluation of "
            f"{evaluation.num_images}."
        )
    places = np.unique(images.labels.numpy(), return_inverse=True)[1]
    others = np.flatnonzero(places != evaluation.labels)
    if len(others):
        raise ValueError(
            f"`dataset` must be the evaluated one, but the classes of {len(others)} images "
            f"differ, first of image {others[0]}."
        )
    return images


def neighbor_is_right(evaluation: Evaluation) -> npt.NDArray[np.bool_]:
    """Whether each neighbour is of its query's class, ``[Q, K]``."""
    labels = evaluation.labels
    searched = labels if evaluation.gallery_labels is None else evaluation.gallery_labels
    right: npt.NDArray[np.bool_] = (
        searched[evaluation.neighbors] == labels[evaluation.queries][:, None]
    )
    return right


def hits(evaluation: Evaluation, row: int, k: int) -> list[Hit]:
    """The k nearest images of the query in a row of `Evaluation.queries`, as far as there are k."""
    own = evaluation.labels[evaluation.queries[row]]
    found = zip(
        evaluation.neighbors[row, :k].tolist(),
        evaluation.neighbor_scores[row, :k].tolist(),
        strict=True,
    )
    return [
        Hit(image, class_name(evaluation, image), score, bool(evaluation.labels[image] == own))
        for image, score in found
    ]


def class_name(evaluation: Evaluation, image: int) -> str:
    """Name of the class of an image."""
    return evaluation.class_names[int(evaluation.labels[image])]


def classes_in_turn(classes: npt.NDArray[np.int64], places: Sequence[int]) -> list[int]:
    """The places, in their order within a class, but with the classes taking turns."""
    seen: dict[int, int] = {}
    turns = []
    for place in places:
        turn = seen[int(classes[place])] = seen.get(int(classes[place]), -1) + 1
        turns.append(turn)
    return [places[i] for i in np.argsort(turns, kind="stable")]


def pair_densities(evaluation: Evaluation) -> dict[str, npt.NDArray[np.float64]]:
    """Either kind of pair over the bins of the histogram, as an area of 1, or 0 without a pair.

    The many pairs of different classes would otherwise hide the few of one class.
    """
    histogram = evaluation.histogram
    widths = np.diff(histogram.edges)
    return {
        kind: counts / (max(1, counts.sum()) * widths)
        for kind, counts in (("different", histogram.different), ("same", histogram.same))
    }


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
