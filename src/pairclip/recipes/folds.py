"""Which images a fold trains on, and on which it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# A share of what there is, where the caller doesn't say how much is held out.
_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Fold:
    """Places in the dataset, each ascending.

    Attributes:
        train: Images that are trained on.
        trained: Held-out images of the classes that are trained on.
        left_out: Images of the classes that are left out of the training.
    """

    train: IntArray
    trained: IntArray
    left_out: IntArray


def divide(
    labels: IntArray, *, folds: int, held_out_classes: int | None, images_per_class: int, seed: int
) -> list[Fold]:
    """Leave out other classes, and hold out other images of the rest, in each fold.

    With four classes of five images, two folds and one class left out, for instance: the first
    fold leaves out class 2, and holds out two images of each of the classes 0, 1 and 3; the second
    leaves out class 0, and holds out two others of each of 1 and 3, and of 2.

    Args:
        labels: Class of each image.
        folds: How many.
        held_out_classes: Classes that each fold leaves out; None for a fifth, at least two.
        images_per_class: Images of a class that are evaluated at most. A fifth of a trained class
            is held out, at least two; of a class with fewer than four images, none.
        seed: Decides all of it.

    Raises:
        ValueError: If there are too few classes.
    """
    random = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    own = dict(zip(classes, by_class, strict=True))
    classes = random.permutation(classes[counts > 1])
    count = len(classes)
    left = max(2, round(_SHARE * count)) if held_out_classes is None else held_out_classes
    if left == 1 or count - left < 2:
        raise ValueError(
            f"`held_out_classes` must be 0, or from 2 to {count - 2} of the {count} classes with "
            f"two images or more, got {left}: two classes at least are searched, and two trained "
            "on. With 0, give `others` to see what is lost elsewhere."
        )
    if folds * left > count:
        raise ValueError(
            f"`folds` {folds} times {left} classes left out are more than the {count} classes. "
            "Lower `folds` or `held_out_classes`, so that each fold leaves out others."
        )
    images = {c: random.permutation(own[c]) for c in classes}
    return [
        _fold(images, set(classes[fold * left : (fold + 1) * left]), fold, images_per_class)
        for fold in range(folds)
    ]


def _fold(images: dict[int, IntArray], left: set[int], fold: int, most: int) -> Fold:
    parts: tuple[list[IntArray], ...] = ([], [], [])
    for of_class, own in images.items():
        if of_class in left:
            parts[2].append(own[:most])
            continue
        count = min(max(2, round(_SHARE * len(own))), most) if len(own) >= 4 else 0
        own = np.roll(own, -fold * count)
        parts[0].append(own[count:])
        parts[1].append(own[:count])
    return Fold(*(np.sort(np.concatenate([*part, np.zeros(0, np.int64)])) for part in parts))
