"""What a comparison of recipes found: the table, and the verdict."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pairclip._files import plain, write_json
from pairclip.evaluation import Change
from pairclip.evaluation.wording import difference_of, interval_of
from pairclip.recipes.recipe import Recipe

TRAINED, LEFT_OUT, OTHERS = "trained", "classes left out", "others"
METRICS = {"recall_at_1": "R@1", "mean_average_precision": "mAP"}


@dataclass(frozen=True)
class RecipeResult:
    """What one recipe did in the last round that it was in.

    A change is that of a metric over the queries of all folds, from the untouched tower to the
    tuned one, with its 95 % paired bootstrap interval over images.

    Attributes:
        recipe: The recipe.
        steps: For how many steps it was trained in each fold of that round.
        finalist: Whether that was the last round.
        trained: Changes on held-out images of the classes trained on, ``recall_at_1`` and
            ``mean_average_precision``.
        elsewhere: The same of what wasn't trained on, by name: ``"classes left out"``, and
            ``"others"`` where they were given.
    """

    recipe: Recipe
    steps: int
    finalist: bool
    trained: dict[str, Change]
    elsewhere: dict[str, dict[str, Change]]

    @property
    def _changes(self) -> list[Change]:
        """Of each metric on what was trained on, and then elsewhere."""
        return [of[name] for of in (self.trained, *self.elsewhere.values()) for name in METRICS]

    @property
    def gain(self) -> Change:
        """Change of mean average precision on the classes trained on."""
        return self.trained["mean_average_precision"]

    @property
    def loss(self) -> float:
        """Largest fall of mean average precision elsewhere; negative where it rose everywhere."""
        return -min(of["mean_average_precision"].difference for of in self.elsewhere.values())


@dataclass(frozen=True)
class RecipeComparison:
    """Which recipe to take, if any; made by `compare_recipes`.

    Attributes:
        results: One for each recipe: those of the last round first, and in each round the best
            first.
        limit: By how much mean average precision elsewhere might fall.

    Example:
        >>> from pairclip import Recipe
        >>> from pairclip.evaluation import Change
        >>> from pairclip.recipes import RecipeComparison, RecipeResult
        >>> up, down = Change(0.5, 0.75, (0.2, 0.3)), Change(0.5, 0.25, (-0.3, -0.2))
        >>> trained = {"recall_at_1": up, "mean_average_precision": up}
        >>> left_out = {"recall_at_1": down, "mean_average_precision": down}
        >>> result = RecipeResult(
        ...     Recipe("wild"), 600, True, trained, {"classes left out": left_out})
        >>> comparison = RecipeComparison([result], limit=0.01)
        >>> comparison.best is None
        True
        >>> print(comparison.verdict)
        Leave the tower as it is. 'wild' gains 0.250 mAP (+0.200 to +0.300), but elsewhere mAP \
falls by 0.250, more than the limit of 0.01.
    """

    results: list[RecipeResult]
    limit: float

    @property
    def best(self) -> Recipe | None:
        """The recipe that gains most among those of the last round that may be taken, or None."""
        fit = [result for result in self.results if not self._objection(result)]
        return max(fit, key=lambda result: result.gain.difference).recipe if fit else None

    @property
    def verdict(self) -> str:
        """What to do, and why."""
        best = self.best
        if best is None:
            objections = [self._objection(r) for r in self.results if r.finalist]
            return f"Leave the tower as it is. {' '.join(objections)}"
        result = next(result for result in self.results if result.recipe is best)
        return f"Take {best.name!r}: it {_gain(result)}, and elsewhere mAP {_elsewhere(result)}."

    def _objection(self, result: RecipeResult) -> str:
        """Why a recipe may not be taken; empty if it may."""
        name = repr(result.recipe.name)
        if not result.finalist:
            return f"{name} was out before the last round."
        if result.gain.interval is None or result.gain.interval[0] <= 0:
            return f"{name} {_gain(result)}, which may be nothing."
        if result.loss > self.limit:
            return (
                f"{name} {_gain(result)}, but elsewhere mAP {_elsewhere(result)}, more than the "
                f"limit of {self.limit:g}."
            )
        return ""

    def to_markdown(self) -> str:
        """A table with the verdict below it; a change whose interval leaves out 0 is in bold."""
        first = self.results[0]
        columns = [
            f"{place}, {title}"
            for place in (TRAINED, *first.elsewhere)
            for title in METRICS.values()
        ]
        before = [f"{change.before:.3f}" for change in first._changes]
        lines = [
            f"| recipe | steps | {' | '.join(columns)} |",
            "|---|---:|" + "---:|" * len(columns),
            f"| untouched | 0 | {' | '.join(before)} |",
        ]
        for result in self.results:
            cells = " | ".join(map(_cell, result._changes))
            lines.append(f"| {result.recipe.name} | {result.steps} | {cells} |")
        return "\n".join([*lines, "", self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts and numbers; a loss by its description."""
        best = self.best
        return {
            "best": None if best is None else best.name,
            "verdict": self.verdict,
            "limit": self.limit,
            "results": [
                {**plain(vars(result)), "recipe": result.recipe.to_dict()}
                for result in self.results
            ],
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file, whole or not at all.

        Args:
            path: The file; its folder must exist.

        Raises:
            OSError: If it can't be written.
        """
        write_json(path, self.to_dict(), indent=1)


def _gain(result: RecipeResult) -> str:
    change = result.gain
    interval = "" if change.interval is None else f" ({interval_of(change)})"
    verb = "gains" if change.difference >= 0 else "loses"
    return f"{verb} {abs(change.difference):.3f} mAP{interval}"


def _elsewhere(result: RecipeResult) -> str:
    return f"falls by {result.loss:.3f}" if result.loss > 0 else "doesn't fall"


def _cell(change: Change) -> str:
    interval = "" if change.interval is None else f" ({interval_of(change)})"
    return difference_of(change) + interval
