"""Which parameters of a tower train."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from pairclip import _checks
from pairclip.towers import adapters

if TYPE_CHECKING:
    from pairclip.towers.vision_tower import VisionTower


def freeze(
    tower: VisionTower,
    names: str | Sequence[str] | None,
    *,
    all_but_last: int | None,
    all_but: str | Sequence[str] | None,
) -> None:
    """Set `requires_grad` as `VisionTower.freeze` says."""
    arguments = {"names": names, "all_but_last": all_but_last, "all_but": all_but}
    got = [f"`{name}`" for name, value in arguments.items() if value is not None]
    if len(got) != 1:
        raise ValueError(
            f"Give one of `names`, `all_but_last` and `all_but`, got {' and '.join(got) or 'none'}."
        )
    if names is not None:
        for parameter in _named(tower, "names", names):
            parameter.requires_grad = False
        return
    if all_but is not None:
        trainable = _named(tower, "all_but", all_but)
    else:
        trainable = _last(tower, all_but_last)
    frozen_by_peft = adapters.has_adapters(tower)
    for parameter in tower.parameters():
        may_train = parameter.requires_grad or not frozen_by_peft
        parameter.requires_grad = may_train and parameter in trainable


def say_what_trains(tower: VisionTower) -> tuple[int, int]:
    """Print how much of a tower trains; the numbers of trainable and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in tower.parameters()]
    trainable, total = sum(size for size, trains in sizes if trains), sum(s for s, _ in sizes)
    try:
        blocks = tower.blocks
    except NotImplementedError:
        of_blocks = ""
    else:
        train = sum(any(p.requires_grad for p in block.parameters()) for block in blocks)
        of_blocks = f", {train} of {len(blocks)} blocks"
    percent = 100 * trainable / max(total, 1)
    print(f"Trainable: {trainable:,} of {total:,} parameters ({percent:.1f} %){of_blocks}.")
    return trainable, total


def _last(tower: VisionTower, count: int | None) -> set[nn.Parameter]:
    depths, blocks = tower._depths(), len(tower.blocks)
    count = _checks.check_count("all_but_last", count)
    if count > blocks:
        raise ValueError(
            f"`all_but_last` must be at most {blocks}, the tower's blocks, got {count}."
        )
    return {p for name, p in tower.named_parameters() if depths[name] > blocks - count}


def _named(tower: VisionTower, argument: str, names: str | Sequence[str]) -> set[nn.Parameter]:
    patterns = [names] if isinstance(names, str) else list(names)
    if not patterns or not all(isinstance(name, str) for name in patterns):
        raise TypeError(f"`{argument}` must be a name or a list of names, got {names!r}.")
    parameters = dict(tower.named_parameters())
    matches: set[nn.Parameter] = set()
    for name in patterns:
        if name == "projection":
            more = set(tower._projection())
        else:
            more = {p for path, p in parameters.items() if _matches(path, name)}
        if not more:
            raise ValueError(f"`{argument}` {name!r} matches no parameter. {_near(tower, name)}")
        matches |= more
    return matches


def _matches(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.") or fnmatchcase(path, name)


def _near(tower: VisionTower, name: str) -> str:
    paths = [path for path, part in tower.named_modules() if path and list(part.parameters())]
    paths += [path for path, _ in tower.named_parameters()]
    near = [path for path in paths if path.endswith(f".{name}")]
    near += difflib.get_close_matches(name, paths, n=5, cutoff=0.4)
    if not near:
        return f"Names are those of `tower.named_parameters()`, such as '{paths[-1]}'."
    return f"Near it are: {', '.join(dict.fromkeys(near))}."
