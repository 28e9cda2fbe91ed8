"""Faults that can be seen in images and classes without a tower."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pairclip.collection.check import Check, Finding
from pairclip.evaluation.suspects import near_duplicates

_TINY = 16  # pixels, of the shorter side
_LONG = 5  # times as long as wide
_USUAL_MODES = {"RGB", "L"}


def copies(
    check: Check,
    readable: list[int],
    small: npt.NDArray[np.float32],
    same_image: float,
) -> dict[str, list[Finding]]:
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
    findings: dict[str, list[Finding]] = {title: [] for title in titles}
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
        findings[title].append(Finding(detail, tuple(group)))
    return findings


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


def of_classes(check: Check) -> dict[str, list[Finding]]:
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
            Finding(f"{name} in {part}: it has nothing to find", tuple(of_class))
            for part, of_part in places.items()
            for name, of_class in sorted(of_part.items())
            if len(of_class) == 1
        ],
        "Classes that are in one part alone": [
            Finding(f"{name} is not in {part}")
            for part, of_part in places.items()
            for name in sorted(names - of_part.keys())
        ],
        "Classes of nearly the same name": [
            Finding(", ".join(map(repr, several))) for several in alike.values() if len(several) > 1
        ],
    }


def looks(
    check: Check, readable: Iterable[int], small: npt.NDArray[np.float32]
) -> dict[str, list[Finding]]:
    """Images that are readable, and unusual."""
    unusual: dict[str, list[Finding]] = defaultdict(list)
    for place in readable:
        item = check.items[place]
        width, height = item.size
        if not small[place].any():
            unusual["Images of one colour"].append(Finding("nothing to be seen", (place,)))
        if min(item.size) < _TINY:
            unusual["Tiny images"].append(Finding(f"{width} x {height} pixels", (place,)))
        elif max(item.size) > _LONG * min(item.size):
            unusual["Very long images"].append(Finding(f"{width} x {height} pixels", (place,)))
        if item.mode not in _USUAL_MODES:
            unusual["Images of unusual modes"].append(Finding(f"mode {item.mode}", (place,)))
        if item.frames > 1:
            detail = f"{item.frames} frames, of which the first counts"
            unusual["Files of several images"].append(Finding(detail, (place,)))
    return unusual
