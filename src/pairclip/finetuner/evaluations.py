"""What is evaluated during a fit, and images that are looked at before it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor

from pairclip.datasets import LabelledImages
from pairclip.datasets.checking import Problem, in_words, problems_of
from pairclip.embedding import embed
from pairclip.evaluation import evaluate_embeddings
from pairclip.towers import VisionTower

_LOOKED_AT = 256
Evaluate = Callable[[Any], Mapping[str, float]]  # from the tower to numbers by name


def choose_evaluation(
    evaluate: Callable[[Any], Mapping[str, Any]] | None,
    data: LabelledImages | None,
    workers: Mapping[str, Any],
) -> Evaluate | None:
    """What evaluates the tower during a fit, or None.

    Raises:
        TypeError: If `evaluate` is no callable.
        ValueError: If both are given, or no image of `data` has another one of its class.
    """
    if evaluate is not None:
        if not callable(evaluate):
            raise TypeError(
                f"`evaluate` must be a callable that takes the tower, got {evaluate!r}."
            )
        if data is not None:
            raise ValueError(
                "`eval_dataset` would be ignored: `evaluate` is given. Pass one of them."
            )
        return partial(_numbers_of, evaluate)
    if data is None:
        return None
    if len(data.labels.unique()) == len(data):
        raise ValueError(
            f"`eval_dataset` has {len(data)} images, each alone in its class, so none can find "
            "another. Check that the labels are class ids, and give classes two images or more."
        )
    return partial(_evaluate, data=data, workers=workers)


def _evaluate(
    tower: VisionTower, data: LabelledImages, workers: Mapping[str, Any]
) -> dict[str, float]:
    embeddings = embed(tower, data, **workers)
    result = evaluate_embeddings(embeddings, data.labels, class_names=data.class_names)
    # Not `to_dict`: of 11,000 classes it would list 128 million similarities.
    return {name: value for name, value in vars(result).items() if isinstance(value, (int, float))}


def _numbers_of(evaluate: Callable[[Any], Any], tower: Any) -> dict[str, float]:
    """The single numbers that an evaluation of somebody's own gives, of whatever type."""
    result = evaluate(tower)
    if not isinstance(result, Mapping):
        raise TypeError(
            f"`evaluate` must return numbers by name, a dict, got {type(result).__name__}."
        )
    return {
        name: value if isinstance(value, int) else float(value)
        for name, value in result.items()
        if name != "step"  # which the fit itself tells
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0)
    }


def left_out_of(images: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of `History.unreadable`, from what has an attribute of that name, by argument."""
    return [
        {"argument": name, **vars(problem)}
        for name, data in images.items()
        for problem in (() if data is None else data.unreadable)
    ]


def check_all_images(
    images: Mapping[str, LabelledImages | None], how: str | None, num_workers: int
) -> None:
    """Look at the images of the arguments of a fit, those of the evaluation at least at a few."""
    for name, data in images.items():
        if data is None or data.of_features:
            continue
        if how == "decode":
            _refuse(name, data, problems_of(data.source, num_workers=num_workers))
        elif how == "paths":
            _refuse(name, data, _missing(data, range(len(data))))
        elif name == "eval_dataset":
            few = range(0, len(data), max(1, len(data) // _LOOKED_AT))
            _refuse(name, data, _missing(data, few))


def _missing(data: LabelledImages, indices: range) -> list[Problem]:
    if data.source.in_memory:
        return []
    paths = {index: data.source.known_path(index) for index in indices}
    there = {index: path is not None and os.path.exists(path) for index, path in paths.items()}
    # A dataset may tell names that are relative to a folder of its own: then none is there.
    relative = any(there[i] and not os.path.isabs(path) for i, path in paths.items() if path)
    return [
        Problem(index, path, "there is no such file")
        for index, path in paths.items()
        if path and not there[index] and (relative or os.path.isabs(path))
    ]


def _refuse(name: str, data: LabelledImages, problems: list[Problem]) -> None:
    if problems:
        raise ValueError(
            f"`{name}` has {len(problems):,} of {len(data):,} images that can't be read "
            f"({in_words(problems)})."
        )
