"""Faults that can be seen in images and classes without a tower."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pairclip.command.collection import Check, Problem
from pairclip.evaluation.suspects import near_duplicates

_TINY = 16  # pixels, of the shorter side
_LONG = 5  # times as long as wide
_USUAL_MODES = {"RGB", "L"}


def copies(
    check: Check,
    readable: list[int],
    small: np.ndarray[Any, np.dtype[np.float32]],
    same_image: float,
) -> dict[str, list[Problem]]:
    """Groups of images that are the same, sorted by what is worst about them."""
    items = check.items
    pairs = [
        (readable[one], readable[other])
        for one, other, _ in near_duplicates(
            torch.from_numpy(small[readable]), min_score=same_image
        )
        if small[readable[one]].any()
    ]
    of_pixels: dict[str, int] = {}
    for place in readable:
        first = of_pixels.setdefault(items[place].pixels, place)
        if first != place:
            pairs.append((first, place))
    titles = (
        "The same image in different classes",
        "The same image in train and test",
        "Copies within a part",
    )
    problems: dict[str, list[Problem]] = {title: [] for title in titles}
    for group in _groups(len(items), pairs):
        classes = sorted({items[place].class_name for place in group})
        parts = list(dict.fromkeys(items[place].part for place in group))
        exact = len({items[place].pixels for place in group}) == 1
        how = "equal in every pixel" if exact else "nearly equal"
        if len(classes) > 1:
            title, detail = titles[0], f"{how}, of {', '.join(classes)}"
            check.drop |= set(group)
        elif len(parts) > 1:
            title, detail = titles[1], f"{how}, in {' and '.join(parts)}"
            # That of the last part stays: what is evaluated must not have been trained on.
            check.drop |= set(group[:-1])
        else:
            title, detail = titles[2], f"{how}, {len(group)} times"
            check.drop |= set(group[1:])
        problems[title].append(Problem(detail, tuple(group)))
    return problems


def _groups(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """The connected ones together, each group in order."""
    if not pairs:
        return []
    rows, columns = np.array(pairs).T
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(count, count))
    _, group_of = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = defaultdict(list)
    for place in sorted({*rows.tolist(), *columns.tolist()}):
        groups[int(group_of[place])].append(place)
    return list(groups.values())


def of_classes(check: Check) -> dict[str, list[Problem]]:
    """What is wrong with classes as a whole."""
    places: dict[str, dict[str, list[int]]] = {part: defaultdict(list) for part in check.parts}
    for place, item in enumerate(check.items):
        if item.problem is None:
            places[item.part][item.class_name].append(place)
    names = {name for of_part in places.values() for name in of_part}
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        alike["".join(each for each in name.casefold() if each.isalnum())].append(name)
    return {
        "Classes of one image": [
            Problem(f"{name} in {part}: it has nothing to find", tuple(of_class))
            for part, of_part in places.items()
            for name, of_class in sorted(of_part.items())
            if len(of_class) == 1
        ],
        "Classes that are in one part alone": [
            Problem(f"{name} is not in {part}")
            for part, of_part in places.items()
            for name in sorted(names - of_part.keys())
        ],
        "Classes of nearly the same name": [
            Problem(", ".join(map(repr, several))) for several in alike.values() if len(several) > 1
        ],
    }


def looks(
    check: Check, readable: Iterable[int], small: np.ndarray[Any, np.dtype[np.float32]]
) -> dict[str, list[Problem]]:
    """Images that are readable, and unusual."""
    found: dict[str, list[Problem]] = defaultdict(list)
    for place in readable:
        item = check.items[place]
        width, height = item.size
        if not small[place].any():
            found["Images of one colour"].append(Problem("nothing to be seen", (place,)))
        if min(item.size) < _TINY:
            found["Tiny images"].append(Problem(f"{width} x {height} pixels", (place,)))
        elif max(item.size) > _LONG * min(item.size):
            found["Very long images"].append(Problem(f"{width} x {height} pixels", (place,)))
        if item.mode not in _USUAL_MODES:
            found["Images of unusual modes"].append(Problem(f"mode {item.mode}", (place,)))
        suffix = Path(item.path or "").suffix.lower()
        if suffix in {".gif", ".tif", ".tiff", ".webp"} and item.path is not None:
            with Image.open(item.path) as opened:
                if (frames := getattr(opened, "n_frames", 1)) > 1:
                    detail = f"{frames} frames, of which the first counts"
                    found["Files of several images"].append(Problem(detail, (place,)))
    return found
