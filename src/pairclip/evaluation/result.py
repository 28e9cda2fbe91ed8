"""The result of an evaluation: to compare, to save and to show."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pairclip import _checks, _files
from pairclip.datasets import Problem
from pairclip.evaluation.comparison import Change, paired_intervals
from pairclip.evaluation.histogram import FloatArray, IntArray, PairHistogram
from pairclip.evaluation.reading import fields_of
from pairclip.evaluation.wording import MAKES_EVALUATIONS, as_text, change_row
from pairclip.retrieval import METRICS, QUERY_METRICS
from pairclip.similarity import ClassTotals

_FORMAT = 1
# What grows with the images, and so is in the file only.
_PER_IMAGE = {"labels", "queries", "gallery_labels", "neighbors", "neighbor_scores", "per_query"}
# With more classes the matrix of all of them is in no file and no dict.
_MOST_CLASSES = 1000


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of one set of embeddings, each item searched among the others.

    Items of equal similarity count as the expectation over their random order.

    Attributes:
        recall_at_1: Share of queries whose nearest item is of their class; in ``[0, 1]``.
        recall_at_5: Share of queries with one of their class among the 5 nearest.
        recall_at_10: The same among the 10 nearest.
        precision_at_10: Share of the 10 nearest that are of the query's class.
        r_precision: The same of the R nearest, where R is how many the class has to find.
        map_at_r: Mean over queries of the average precision of the R nearest.
        mean_average_precision: Mean over queries of the average precision; in ``(0, 1]``.
        knn_accuracy: Share of queries whose class wins the vote of the 5 nearest.
        same_mean: Mean cosine over all pairs of one class; in ``[-1, 1]``.
        same_std: Standard deviation of these cosines.
        different_mean: Mean cosine over all pairs of different classes; NaN with one class.
        different_std: Standard deviation of these.
        gap: ``same_mean - different_mean``.
        roc_auc: Chance that a pair of one class is more similar than one of different classes.
        roc_auc_error: How far `roc_auc` may be off, because it is computed from a histogram.
        pair_average_precision: Average precision of all pairs, ranked by similarity.
        pair_average_precision_error: How far that may be off.
        best_threshold: Cosine above which two images are best called of one class.
        balanced_accuracy: Mean share of pairs of one and of different classes called right so.
        balanced_accuracy_error: How much better another threshold may be.
        num_images: Images evaluated, N.
        num_queries: Those with another image of their class, which are the queries, Q.
        class_names: Name of each class.
        confused_classes: The most similar pairs of different classes, as
            ``(name, name, mean cosine)``, most similar first.
        per_class: Mean of each metric of queries over the queries of a class, ``[C]`` float64
            under the metric's name; NaN where a class has no query.
        labels: Each image's place in `class_names`, int64 ``[N]``.
        queries: Which images are the queries, int64 ``[Q]``.
        per_query: Each metric of queries for every one, ``[Q]`` float64 under the metric's name.
        neighbors: The nearest images of each query, nearest first, int64 ``[Q, K]``, K at most
            10.
        neighbor_scores: Their cosines, float32 ``[Q, K]``.
        histogram: Pairs of one and of different classes, counted by similarity.
        class_pairs: What `class_similarity` is computed from when it is first asked for, so that
            many classes take no memory before; the matrix itself if it was read from a file.
        gallery_labels: Each gallery image's place in `class_names`, int64; None where images are
            searched among themselves. `neighbors` are then images of the gallery.
        also: Evaluations of further datasets, by name.
        unreadable: The images that ``LabelledImages(..., on_error="skip")`` left out, of the
            queries and then of the gallery.

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
    precision_at_10: float
    r_precision: float
    map_at_r: float
    mean_average_precision: float
    knn_accuracy: float
    same_mean: float
    same_std: float
    different_mean: float
    different_std: float
    gap: float
    roc_auc: float
    roc_auc_error: float
    pair_average_precision: float
    pair_average_precision_error: float
    best_threshold: float
    balanced_accuracy: float
    balanced_accuracy_error: float
    num_images: int
    num_queries: int
    class_names: list[str]
    confused_classes: list[tuple[str, str, float]]
    per_class: dict[str, FloatArray] = field(repr=False)
    labels: IntArray = field(repr=False)
    queries: IntArray = field(repr=False)
    per_query: dict[str, FloatArray] = field(repr=False)
    neighbors: IntArray = field(repr=False)
    neighbor_scores: npt.NDArray[np.float32] = field(repr=False)
    histogram: PairHistogram = field(repr=False)
    class_pairs: ClassTotals | FloatArray | None = field(repr=False)
    gallery_labels: IntArray | None = field(default=None, repr=False)
    also: dict[str, Evaluation] = field(default_factory=dict)
    unreadable: list[Problem] = field(default_factory=list)

    @cached_property
    def class_similarity(self) -> FloatArray:
        """Mean cosine of the pairs between two classes, float64 ``[C, C]``.

        NaN for a class of one image with itself.

        Raises:
            ValueError: If this was read from a file, which has no matrix of over 1,000 classes.
        """
        if self.class_pairs is None:
            raise ValueError(
                f"A file has no `class_similarity` of over {_MOST_CLASSES} classes, and this was "
                f"read from one with {len(self.class_names)}. Evaluate again."
            )
        if isinstance(self.class_pairs, ClassTotals):
            matrix: FloatArray = self.class_pairs.mean_cosines(0, len(self.class_names)).numpy()
            return matrix
        return self.class_pairs

    def changes(self, baseline: Evaluation) -> dict[str, Change]:
        """Each metric before and after, with how sure the change is.

        Args:
            baseline: An evaluation of the same images, "before".

        Returns:
            The changes under the metrics' names, in the order of the table.

        Raises:
            ValueError: If `baseline` is of other images, as far as their number and labels tell.

        Example:
            >>> import torch
            >>> from pairclip import evaluate_embeddings
            >>> labels = torch.tensor([0, 0, 1, 1])
            >>> before = evaluate_embeddings(torch.eye(4), labels)
            >>> after = evaluate_embeddings(torch.eye(2)[labels], labels)
            >>> change = after.changes(before)["recall_at_1"]
            >>> round(change.difference, 3), change.is_clear
            (0.667, True)
        """
        _checks.check_is("baseline", baseline, Evaluation, MAKES_EVALUATIONS)
        _check_comparable(baseline, self)
        intervals = paired_intervals(
            np.stack([baseline.per_query[key] for key in QUERY_METRICS]),
            np.stack([self.per_query[key] for key in QUERY_METRICS]),
        )
        of_query = {} if intervals is None else dict(zip(QUERY_METRICS, intervals, strict=True))
        return {
            key: Change(
                getattr(baseline, key),
                getattr(self, key),
                (float(of_query[key][0]), float(of_query[key][1])) if key in of_query else None,
            )
            for key in METRICS
        }

    def to_dict(self) -> dict[str, Any]:
        """The metrics under flat keys, as JSON takes them: None where one isn't defined.

        Without what grows with the number of images, which `to_json` writes as well, and with
        ``class_similarity`` None for over 1,000 classes.
        """
        fields = {key: value for key, value in self._plain().items() if key not in _PER_IMAGE}
        return fields | {"also": {name: other.to_dict() for name, other in self.also.items()}}

    def _plain(self) -> dict[str, Any]:
        """All of it but `also` as JSON has it."""
        fields = {key: getattr(self, key) for key in self.__dataclass_fields__}
        del fields["class_pairs"], fields["also"]
        if self.gallery_labels is None:
            del fields["gallery_labels"]
        if not self.unreadable:
            del fields["unreadable"]
        few = len(self.class_names) <= _MOST_CLASSES and self.class_pairs is not None
        fields["class_similarity"] = self.class_similarity if few else None
        return dict(_files.plain(fields))

    def _content(self) -> dict[str, Any]:
        return self._plain() | {
            "also": {name: other._content() for name, other in self.also.items()}
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all of it, queries included, to a file that `from_json` reads; whole or not at all.

        Args:
            path: The file; its folder must exist.

        Raises:
            OSError: If it can't be written.

        Example:
            >>> import tempfile, torch
            >>> from pairclip import Evaluation, evaluate_embeddings
            >>> before = evaluate_embeddings(torch.eye(4), torch.tensor([0, 0, 1, 1]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     before.to_json(f"{folder}/before.json")
            ...     same = Evaluation.from_json(f"{folder}/before.json")
            >>> same.recall_at_1 == before.recall_at_1
            True
        """
        _files.write_json(path, _files.sealed({"format": _FORMAT} | self._content()))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what `to_json` wrote, to compare with it.

        Args:
            path: The file.

        Returns:
            The evaluation.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds no evaluation, or a damaged one, or one that a later
                version of pairclip wrote.
        """
        what = f"`path` must be a file that `Evaluation.to_json` wrote, got {os.fspath(path)!r}"
        content = _files.read_json(Path(path))
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError(f"{what}: it has no format. Evaluate again and save that.")
        if "sha256" in content and content["sha256"] != _files.checksum_of_fields(content):
            raise ValueError(f"{what}: it is damaged. Evaluate again and save that.")
        _files.check_format(content["format"], _FORMAT, f"'{os.fspath(path)}'")
        if content["format"] != _FORMAT:
            raise ValueError(f"{what}: its format is not {_FORMAT}.")
        fields = {key: value for key, value in content.items() if key not in ("format", "sha256")}
        try:
            return _evaluation(fields)
        except ValueError as error:
            raise ValueError(f"{what}: {error}. Evaluate again and save that.") from error

    def to_markdown(self, baseline: Evaluation | None = None) -> str:
        """The metrics as a Markdown table, and those of `also` below it.

        Args:
            baseline: An evaluation of the same images to compare with, shown as "before".
                Metrics of queries then carry a 95 % paired percentile bootstrap interval of the
                change, over queries; a change whose interval leaves out 0 is in bold. The interval
                says nothing of other seeds, or of other images to search.

        Returns:
            Lines of a table, without a line break at the end.

        Raises:
            ValueError: If `baseline` is of other images, as far as their number and labels tell.
        """
        if baseline is None:
            head = ["| | |", "|---|---:|"]
            rows = [
                f"| {metric.title} | {as_text(getattr(self, key))} |"
                for key, metric in METRICS.items()
            ]
        else:
            head = ["| | before | after | change | 95 % interval |", "|---|---:|---:|---:|:---:|"]
            rows = [
                change_row(METRICS[key].title, change)
                for key, change in self.changes(baseline).items()
            ]
        tables = ["\n".join(head + rows)]
        for name, evaluation in self.also.items():
            before = None if baseline is None else baseline.also[name]
            tables += [f"**{name}**", evaluation.to_markdown(before)]
        return "\n\n".join(tables)


def _check_comparable(before: Evaluation, after: Evaluation) -> None:
    galleries: list[Any] = [before.gallery_labels, after.gallery_labels]  # None is equal to None
    if (before.num_images, before.class_names) != (after.num_images, after.class_names):
        raise ValueError(
            f"`baseline` must be of the same images, got {before.num_images} images of "
            f"{len(before.class_names)} classes against {after.num_images} of "
            f"{len(after.class_names)}{_first_other_name(before.class_names, after.class_names)}."
        )
    if not np.array_equal(*galleries):
        raise ValueError("`baseline` must be of the same gallery, got another or one with none.")
    others = np.flatnonzero(before.labels != after.labels)
    if len(others):
        was, now = (each.class_names[each.labels[others[0]]] for each in (before, after))
        raise ValueError(
            f"`baseline` must be of the same images, but the classes of {len(others)} images "
            f"differ, first of image {others[0]}: {was!r} against {now!r}."
        )
    if not np.array_equal(before.queries, after.queries):
        raise ValueError(
            f"`baseline` must have the same queries, got {before.num_queries} against "
            f"{after.num_queries}, or other rows."
        )
    if before.also.keys() != after.also.keys():
        raise ValueError(
            f"`baseline` must have the same evaluations in `also`, got {list(before.also)} "
            f"against {list(after.also)}."
        )


def _first_other_name(before: list[str], after: list[str]) -> str:
    for was, now in zip(before, after, strict=False):
        if was != now:
            return f", the first other class being {was!r} against {now!r}"
    return ""


def _evaluation(content: Any) -> Evaluation:
    fields = fields_of(content)
    fields["also"] = {name: _evaluation(other) for name, other in fields["also"].items()}
    return Evaluation(**fields)
