"""Fields of an evaluation as a file has them, checked one by one."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pairclip.datasets import Problem
from pairclip.evaluation.histogram import FloatArray, IntArray, PairHistogram
from pairclip.retrieval import METRICS, QUERY_METRICS

_NUMBERS = (
    *METRICS,
    "roc_auc_error",
    "pair_average_precision_error",
    "balanced_accuracy_error",
)
_OTHERS = (
    "num_images",
    "num_queries",
    "class_similarity",
    "class_names",
    "confused_classes",
    "per_class",
    "labels",
    "queries",
    "per_query",
    "neighbors",
    "neighbor_scores",
    "histogram",
    "also",
)
_NOT_ALWAYS = ("gallery_labels", "unreadable")


def fields_of(content: Any) -> dict[str, Any]:
    """Arguments of an `Evaluation`, but for `also`, which is as it was.

    Raises:
        ValueError: That says which field is wrong, and how.
    """
    _check_keys("it", content, (*_NUMBERS, *_OTHERS), _NOT_ALWAYS)
    fields: dict[str, Any] = {name: _number(name, content[name]) for name in _NUMBERS}
    images, queries = (_count(name, content[name]) for name in ("num_images", "num_queries"))
    names = content["class_names"]
    if not _is_list_of(str, names) or len(set(names)) < len(names):
        raise ValueError("`class_names` is not a list of different names")
    classes = len(names)
    labels = _integers("labels", content["labels"], (images,), classes)
    gallery = labels
    if "gallery_labels" in content:
        gallery = _integers("gallery_labels", content["gallery_labels"], (None,), classes)
        fields["gallery_labels"] = gallery
    if "unreadable" in content:
        fields["unreadable"] = list(map(_problem, _list("unreadable", content["unreadable"])))
    matrix = content["class_similarity"]
    neighbors = _integers("neighbors", content["neighbors"], (queries, None), len(gallery))
    for group in ("per_class", "per_query"):
        _check_keys(f"`{group}`", content[group], QUERY_METRICS)
    histogram = content["histogram"]
    _check_keys("`histogram`", histogram, ("edges", "same", "different"))
    edges = _floats("edges", histogram["edges"], (None,))
    if not isinstance(content["also"], dict):
        raise ValueError("`also` is not an object")
    return fields | {
        "num_images": images,
        "num_queries": queries,
        "class_pairs": None
        if matrix is None
        else _floats("class_similarity", matrix, (classes, classes)),
        "class_names": names,
        "confused_classes": [
            _confused(each, names)
            for each in _list("confused_classes", content["confused_classes"])
        ],
        "labels": labels,
        "queries": _integers("queries", content["queries"], (queries,), images),
        "per_class": {
            name: _floats(f"per_class.{name}", values, (classes,))
            for name, values in content["per_class"].items()
        },
        "per_query": {
            name: _floats(f"per_query.{name}", values, (queries,))
            for name, values in content["per_query"].items()
        },
        "neighbors": neighbors,
        "neighbor_scores": _floats(
            "neighbor_scores", content["neighbor_scores"], neighbors.shape
        ).astype(np.float32),
        "histogram": PairHistogram(
            edges=edges,
            same=_integers("same", histogram["same"], (len(edges) - 1,), None),
            different=_integers("different", histogram["different"], (len(edges) - 1,), None),
        ),
        "also": content["also"],
    }


def _check_keys(
    what: str, content: Any, expected: Collection[str], optional: Collection[str] = ()
) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} is not an object")
    missing = [name for name in expected if name not in content]
    unknown = [name for name in content if name not in expected and name not in optional]
    if missing or unknown:
        problem = f"lacks {missing}" if missing else f"has an unknown field {unknown[0]!r}"
        raise ValueError(f"{what} {problem}")


def _problem(value: Any) -> Problem:
    _check_keys("an image in `unreadable`", value, ("index", "path", "reason"))
    if not isinstance(value["index"], int):
        raise ValueError(f"`unreadable` has the image {value['index']!r}")
    return Problem(**value)


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` is no number: {value!r}")
    return float(value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is no count: {value!r}")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is no list: {value!r}")
    return value


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _confused(value: Any, names: Collection[str]) -> tuple[str, str, float]:
    if not isinstance(value, list) or len(value) != 3 or not {*map(str, value[:2])} <= set(names):
        raise ValueError(f"`confused_classes` has {value!r}")
    return value[0], value[1], _number("confused_classes", value[2])


def _integers(name: str, value: Any, shape: tuple[int | None, ...], below: int | None) -> IntArray:
    """Whole numbers from 0 on, below a limit."""
    array = _array(name, value, shape, "i").astype(np.int64)
    if array.size and (array.min() < 0 or (below is not None and array.max() >= below)):
        raise ValueError(f"`{name}` has values out of range")
    return array


def _floats(name: str, value: Any, shape: tuple[int | None, ...]) -> FloatArray:
    array = _array(name, value, shape, "ifO")
    try:
        floats = array.astype(np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`{name}` has something else than numbers") from error
    if np.isinf(floats).any():
        raise ValueError(f"`{name}` has infinite values")
    return floats


def _array(name: str, value: Any, shape: tuple[int | None, ...], kinds: str) -> npt.NDArray[Any]:
    try:
        array = np.array(value)
    except ValueError as error:
        raise ValueError(f"`{name}` has rows of different lengths") from error
    if array.size and array.dtype.kind not in kinds:
        raise ValueError(f"`{name}` has something else than numbers")
    if len(shape) != array.ndim or any(
        size not in (None, actual) for size, actual in zip(shape, array.shape, strict=True)
    ):
        wanted = ["any" if size is None else size for size in shape]
        raise ValueError(f"`{name}` has shape {list(array.shape)} instead of {wanted}")
    return array
