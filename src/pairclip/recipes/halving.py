"""Which recipes go on, and for how long each is trained: successive halving.

With five recipes of 600 steps, for instance, there are three rungs: five are trained for 150 steps,
the best three for 300, and the best two for 600. A budget of half of what that takes divides each
of these numbers by two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """One round of the comparison.

    Attributes:
        contenders: How many recipes are in it.
        share: Share of its steps for which each is trained.
    """

    contenders: int
    share: float

    def steps(self, whole: int) -> int:
        """Steps of a recipe that has `whole`."""
        return max(1, math.floor(self.share * whole))


def rungs(steps: Sequence[int], *, folds: int, budget: int | None) -> list[Rung]:
    """The rounds for recipes of so many steps each.

    Args:
        steps: Whole length of each recipe.
        folds: How often each is trained in a round.
        budget: Steps of all trainings together at most; None doesn't limit them.

    Returns:
        Rounds in which the number of recipes falls by half and the length doubles.

    Raises:
        ValueError: If the budget is less than one step for each training.
    """
    count = max(1, math.ceil(math.log2(len(steps))))
    rounds = [Rung(math.ceil(len(steps) / 2**i), 2.0 ** (i + 1 - count)) for i in range(count)]
    if budget is None:
        return rounds
    least = folds * sum(rung.contenders for rung in rounds)
    if budget < least:
        raise ValueError(
            f"`budget` must be at least {least} steps, one for each of the trainings of "
            f"{len(steps)} recipes in {folds} folds, got {budget}."
        )
    # Who goes on isn't known yet: the longest might.
    longest = sorted(steps, reverse=True)
    whole = folds * sum(r.share * sum(longest[: r.contenders]) for r in rounds)
    scale = min(1.0, budget / whole)
    return [Rung(rung.contenders, rung.share * scale) for rung in rounds]


def order(gains: Sequence[float], excesses: Sequence[float]) -> list[int]:
    """Places of the recipes, best first.

    Those that lose least beyond the limit come first, and of equal ones those that gain most: a
    recipe that keeps within the limit goes before any that doesn't.
    """
    return sorted(range(len(gains)), key=lambda i: (max(0.0, excesses[i]), -gains[i]))
