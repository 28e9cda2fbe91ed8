"""How well embeddings keep classes apart: figures before and after, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pairclip import _checks
from pairclip.datasets import LabelledImages
from pairclip.embedding import embed_images
from pairclip.retrieval import per_query
from pairclip.similarity import class_similarity_matrix
from pairclip.towers import VisionTower

_TITLES = {
    "recall_at_1": "Recall at 1",
    "recall_at_5": "Recall at 5",
    "recall_at_10": "Recall at 10",
    "mean_average_precision": "Mean average precision",
    "knn_accuracy": "k-nearest-neighbour accuracy",
    "same_mean": "Mean similarity, same class",
    "different_mean": "Mean similarity, different classes",
    "gap": "Gap between the two",
}
_KS = (1, 5, 10)
_NEIGHBORS = 5
_MOST_CONFUSED = 5


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of one set of embeddings, each item searched among the others.

    Attributes:
        recall_at_1: Share of queries whose nearest item is of their class; in ``[0, 1]``.
        recall_at_5: Share of queries with one of their class among the 5 nearest.
        recall_at_10: The same among the 10 nearest.
        mean_average_precision: Mean over queries of the average precision; in ``(0, 1]``.
        knn_accuracy: Share of queries whose class wins the vote of the 5 nearest.
        same_mean: Mean cosine over all pairs of one class; in ``[-1, 1]``.
        different_mean: Mean cosine over all pairs of different classes; NaN with one class.
        gap: ``same_mean - different_mean``.
        num_images: Images evaluated.
        num_queries: Those with another image of their class, which are the queries.
        class_similarity: Mean cosine of the pairs between two classes, ``[C, C]`` float64.
        class_names: Name of each row of `class_similarity`.
        confused_classes: The most similar pairs of different classes, as
            ``(name, name, mean cosine)``, most similar first.

    Example:
        >>> import torch
        >>> from pairclip import evaluate_embeddings
        >>> evaluation = evaluate_embeddings(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> round(evaluation.recall_at_1, 3), evaluation.same_mean
        (0.333, 0.0)
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    mean_average_precision: float
    knn_accuracy: float
    same_mean: float
    different_mean: float
    gap: float
    num_images: int
    num_queries: int
    class_similarity: npt.NDArray[np.float64]
    class_names: list[str]
    confused_classes: list[tuple[str, str, float]]

    def to_dict(self) -> dict[str, Any]:
        """All figures under flat keys, as JSON takes them: None where a figure isn't defined."""
        figures: dict[str, Any] = {key: _or_none(getattr(self, key)) for key in _TITLES}
        return figures | {
            "num_images": self.num_images,
            "num_queries": self.num_queries,
            "class_names": self.class_names,
            "class_similarity": [[_or_none(x) for x in row] for row in self.class_similarity],
            "confused_classes": [list(pair) for pair in self.confused_classes],
        }

    def to_markdown(self, baseline: Evaluation | None = None) -> str:
        """The figures as a Markdown table.

        Args:
            baseline: An evaluation of the same images to compare with, shown as "before".

        Returns:
            Lines of a table, without a line break at the end.

        Raises:
            ValueError: If `baseline` is of other images, by their number and classes.
        """
        if baseline is None:
            rows = [f"| {title} | {getattr(self, key):.3f} |" for key, title in _TITLES.items()]
            return "\n".join(["| | |", "|---|---:|", *rows])
        if (baseline.num_queries, baseline.num_images, baseline.class_names) != (
            self.num_queries,
            self.num_images,
            self.class_names,
        ):
            raise ValueError(
                f"`baseline` must be of the same images, got {baseline.num_images} images of "
                f"{len(baseline.class_names)} classes against {self.num_images} of "
                f"{len(self.class_names)}."
            )
        rows = [
            f"| {title} | {before:.3f} | {after:.3f} | {after - before:+.3f} |"
            for key, title in _TITLES.items()
            for before, after in [(getattr(baseline, key), getattr(self, key))]
        ]
        return "\n".join(["| | before | after | change |", "|---|---:|---:|---:|", *rows])


def evaluate(
    tower: VisionTower, dataset: Any, *, batch_size: int = 64, num_workers: int = 0
) -> Evaluation:
    """Embed a labelled dataset and say how well the embeddings keep its classes apart.

    Args:
        tower: Embeds the images.
        dataset: Any labelled dataset that `LabelledImages` takes.
        batch_size: Images per forward pass.
        num_workers: Processes that load and preprocess images.

    Returns:
        The figures, each image searched among the others.

    Raises:
        ValueError: If an image can't be read, an embedding is not finite, or no class has two
            images.

    Example:
        >>> import numpy as np
        >>> from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        >>> from pairclip import evaluate, load_tower
        >>> config = CLIPVisionConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...     image_size=16, patch_size=8, projection_dim=8)
        >>> tower = load_tower(CLIPVisionModelWithProjection(config))
        >>> images = np.zeros((4, 16, 16, 3), dtype=np.uint8)
        >>> images[2:] = 255
        >>> evaluate(tower, (images, ["black", "black", "white", "white"])).recall_at_1
        1.0
    """
    data = LabelledImages(dataset)
    embeddings = embed_images(tower, data, batch_size=batch_size, num_workers=num_workers)
    return evaluate_embeddings(embeddings, data.labels, class_names=data.class_names)


def evaluate_embeddings(
    embeddings: Any, labels: Any, *, class_names: list[str] | None = None
) -> Evaluation:
    """Say how well embeddings keep their classes apart.

    Args:
        embeddings: Shape ``[N, D]``, floating point, any length.
        labels: Class id of each row, shape ``[N]``, integer.
        class_names: Name of class id i at place i; None names classes by their ids.

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
        >>> print(evaluate_embeddings(embeddings, torch.tensor([0, 0, 1, 1])).to_markdown())
        | | |
        |---|---:|
        | Recall at 1 | 1.000 |
        | Recall at 5 | 1.000 |
        | Recall at 10 | 1.000 |
        | Mean average precision | 1.000 |
        | k-nearest-neighbour accuracy | 0.000 |
        | Mean similarity, same class | 0.995 |
        | Mean similarity, different classes | 0.099 |
        | Gap between the two | 0.896 |
    """
    embeddings = _checks.as_embeddings("embeddings", embeddings, finite=True)
    labels = _checks.as_labels("labels", labels, length=len(embeddings))
    found = per_query(embeddings, labels, ks=_KS, neighbors=_NEIGHBORS)
    matrix, classes = class_similarity_matrix(embeddings, labels)
    names = _names(classes.tolist(), class_names)
    counts = labels.unique(return_counts=True)[1].to(matrix)
    same, different = _pair_means(matrix, counts)
    correct = found.knn_correct
    recalls = {f"recall_at_{k}": float(found.hits[:, i].mean()) for i, k in enumerate(_KS)}
    return Evaluation(
        **recalls,
        mean_average_precision=float(found.average_precision.mean()),
        knn_accuracy=math.nan if correct is None else float(correct.mean()),
        same_mean=same,
        different_mean=different,
        gap=same - different,
        num_images=len(embeddings),
        num_queries=len(found.queries),
        class_similarity=matrix.cpu().numpy(),
        class_names=names,
        confused_classes=_confused(matrix, names),
    )


def _names(classes: list[int], class_names: list[str] | None) -> list[str]:
    if class_names is None:
        return [str(of_class) for of_class in classes]
    for of_class in classes:
        if not 0 <= of_class < len(class_names):
            raise ValueError(
                f"`class_names` has {len(class_names)} names, but there is a class id {of_class}."
            )
    return [class_names[of_class] for of_class in classes]


def _pair_means(matrix: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean over all pairs of one class and of different classes, from the means per class."""
    pairs = counts[:, None] * counts
    own = counts * (counts - 1)
    same = (matrix.diagonal().nan_to_num() * own).sum() / own.sum()
    apart = ~torch.eye(len(counts), dtype=torch.bool, device=matrix.device)
    different = (matrix * pairs)[apart].sum() / pairs[apart].sum()
    return float(same), float(different)


def _confused(matrix: Tensor, names: list[str]) -> list[tuple[str, str, float]]:
    rows, columns = torch.triu_indices(len(names), len(names), offset=1)
    similarities = matrix.cpu()[rows, columns]
    top = similarities.topk(min(_MOST_CONFUSED, len(similarities)))
    return [
        (names[int(rows[i])], names[int(columns[i])], value)
        for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _or_none(figure: float) -> float | None:
    return None if math.isnan(figure) else float(figure)
