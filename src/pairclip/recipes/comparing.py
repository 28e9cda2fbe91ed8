"""Compare recipes on a dataset: who goes on, and what the last round shows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pairclip import _checks
from pairclip._progress import progress
from pairclip.datasets import LabelledImages
from pairclip.evaluation import Change
from pairclip.evaluation.comparison import paired_intervals
from pairclip.recipes.comparison import METRICS, TRAINED, RecipeComparison, RecipeResult
from pairclip.recipes.folds import divide
from pairclip.recipes.halving import order, rungs
from pairclip.recipes.recipe import Recipe, default_recipes
from pairclip.recipes.training import images_to_keep
from pairclip.recipes.trials import FloatArray, Material, Scores, Trials, settings_of
from pairclip.towers import VisionTower, tower_of

_KEEP_SHARE = 0.25


def compare_recipes(
    tower: VisionTower,
    dataset: Any,
    recipes: Sequence[Recipe] | None = None,
    *,
    folds: int = 2,
    held_out_classes: int | None = None,
    budget: int | None = None,
    others: Any = None,
    keep: Any = None,
    limit: float = 0.01,
    images_per_class: int = 100,
    folder: str | os.PathLike[str] | None = None,
    cache_trunk: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> RecipeComparison:
    """Find out which recipe to take for a dataset, or that the tower is best left as it is.

    Each recipe is trained on some of the classes, and evaluated on held-out images of these, and
    on classes left out of the training, which are other ones in each fold. By successive halving,
    all recipes are trained for a short while, the better half for twice that, and so on; the last
    two are trained for their whole length. In each round those come first that lose no more than
    `limit` elsewhere, and of these those that gain most.

    The tower is not changed. ``tune(tower, dataset, comparison.best)`` then trains on all of it.

    Args:
        tower: The tower to fine-tune.
        dataset: Any labelled dataset that `LabelledImages` takes, of three classes at least.
        recipes: The recipes to compare, with different names; None for `default_recipes`. Those
            that differ in their blend alone are trained together.
        folds: Divisions of classes and images; each costs as much as the first.
        held_out_classes: Classes that each fold leaves out; None for a fifth, at least two. With
            0, `others` are needed.
        budget: Steps of all trainings together at most; the rounds are shortened to fit. None
            trains the last two recipes for all of their steps.
        others: A labelled dataset of anything else that shall not be forgotten.
        keep: Unlabelled images, or a dataset, for recipes with a `keep_share`.
        limit: By how much mean average precision may fall on the classes left out, and on
            `others`.
        images_per_class: Images of a class that are evaluated at most.
        folder: Where done trainings are noted, so that a comparison that was broken off goes on
            from there; made if it is missing. None keeps nothing. A loss with weights of its own
            must start with the same ones then: call ``torch.manual_seed`` before it is made.
        cache_trunk: Whether recipes that train the last blocks alone have what comes before them
            computed once, by `cache_features` into `folder`. The images must then be the same
            each time that they are read.
        num_workers: Processes that load and preprocess images.
        seed: Decides the folds and the trainings.

    Returns:
        The changes that each recipe made, and the verdict.

    Raises:
        ValueError: If an argument is out of range or would be ignored, or there are too few
            classes.

    Example:
        >>> import numpy as np
        >>> from pairclip import Recipe, compare_recipes
        >>> from pairclip.towers import random_tower
        >>> images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
        >>> recipes = [Recipe(f"{steps} steps", steps=steps, batch_size=8) for steps in (1, 2)]
        >>> comparison = compare_recipes(
        ...     random_tower(), (images, np.arange(40) % 5), recipes, folds=1)
        >>> comparison.best is None  # nothing can be learnt here
        True

    References:
        Jamieson and Talwalkar, Non-stochastic best arm identification, 2016 (successive halving,
        https://arxiv.org/abs/1502.07943).
    """
    _checks.check_positive_int("folds", folds)
    _checks.check_positive_int("images_per_class", images_per_class)
    _checks.check_in("[0, 1]", "limit", limit)
    _checks.check_count("num_workers", num_workers)
    _checks.check_count("seed", seed)
    if held_out_classes is not None:
        _checks.check_count("held_out_classes", held_out_classes)
    if budget is not None:
        _checks.check_positive_int("budget", budget)
    tower = tower_of(tower)
    if held_out_classes == 0 and others is None:
        raise ValueError(
            "`held_out_classes` 0 needs `others`: without either, nothing shows what is forgotten."
        )
    if cache_trunk and folder is None:
        raise ValueError("`cache_trunk` needs a `folder` for the features.")
    data = LabelledImages(dataset)
    recipes = _recipes(_defaults(tower, len(data), keep) if recipes is None else recipes)
    if folder is not None:
        _check_told_apart(recipes)
    rounds = rungs([recipe.steps for recipe in recipes], folds=folds, budget=budget)
    trials = Trials(
        Material(
            tower,
            data,
            others=None if others is None else LabelledImages(others),
            keep=images_to_keep(keep, recipes),
        ),
        folds=divide(
            data.labels.numpy(),
            folds=folds,
            held_out_classes=held_out_classes,
            images_per_class=images_per_class,
            seed=seed,
        ),
        folder=None if folder is None else Path(folder),
        cache_trunk=cache_trunk,
        seed=seed,
        num_workers=num_workers,
    )
    out: list[RecipeResult] = []
    contenders = recipes
    total = folds * sum(rung.contenders for rung in rounds)
    with progress(total=total, desc="Recipes", unit="training") as bar:
        for rung in rounds:
            last = rung is rounds[-1]
            results = _round(
                trials, contenders, [rung.steps(r.steps) for r in contenders], last, bar
            )
            places = order(
                [result.gain.difference for result in results],
                [result.loss - limit for result in results],
            )
            results = [results[place] for place in places]
            going_on = 0 if last else rounds[rounds.index(rung) + 1].contenders
            out = results[going_on:] + out
            contenders = [result.recipe for result in results[:going_on]]
    return RecipeComparison(out, limit)


def _defaults(tower: VisionTower, num_images: int, keep: Any) -> list[Recipe]:
    """The default recipes, with batches that are small beside a small dataset."""
    batch_size = min(256, 2 ** int(np.log2(max(8, num_images / 4))))
    return default_recipes(
        tower, batch_size=batch_size, keep_share=0.0 if keep is None else _KEEP_SHARE
    )


def _recipes(recipes: Sequence[Recipe]) -> list[Recipe]:
    recipes = list(recipes)
    if not recipes:
        raise ValueError("`recipes` is empty. Give one at least, or None for `default_recipes`.")
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"`recipes` must be a list of `Recipe`, got {recipe!r} in it.")
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`recipes` must have different names, got {twice} more than once.")
    return recipes


def _check_told_apart(recipes: Sequence[Recipe]) -> None:
    """Raise if one recipe would be given the trials of another that are kept."""
    by_settings: dict[str, Recipe] = {}
    for recipe in recipes:
        other = by_settings.setdefault(settings_of(recipe), recipe)
        if other.loss is not recipe.loss:
            raise ValueError(
                f"`recipes` {other.name!r} and {recipe.name!r} have losses that can't be told "
                f"apart, {recipe.to_dict()['loss']}, so with a `folder` one would get the trials "
                "of the other. Give the functions names of their own, or leave `folder` out."
            )


def _round(
    trials: Trials, recipes: Sequence[Recipe], steps: Sequence[int], last: bool, bar: Any
) -> list[RecipeResult]:
    """Train and evaluate all contenders in all folds."""
    scores: list[list[Scores]] = [[] for _ in recipes]
    for together in _one_training_each(recipes, steps):
        for fold in range(len(trials.folds)):
            bar.set_postfix_str(f"{recipes[together[0]].name}, fold {fold + 1}")
            of_recipes = trials.run([recipes[i] for i in together], fold, steps[together[0]])
            for place, of_recipe in zip(together, of_recipes, strict=True):
                scores[place].append(of_recipe)
            bar.update(len(together))
    return [
        _result(trials, recipe, count, last, of_folds)
        for recipe, count, of_folds in zip(recipes, steps, scores, strict=True)
    ]


def _one_training_each(recipes: Sequence[Recipe], steps: Sequence[int]) -> list[list[int]]:
    """Places of the recipes that differ in name and blend alone, together."""
    together: dict[Any, list[int]] = {}
    for place, (recipe, count) in enumerate(zip(recipes, steps, strict=True)):
        settings = replace(recipe, name="", blend=1.0, steps=count, loss=None)
        together.setdefault((settings, id(recipe.loss)), []).append(place)
    return list(together.values())


def _result(
    trials: Trials, recipe: Recipe, steps: int, last: bool, scores: Sequence[Scores]
) -> RecipeResult:
    changes = {}
    for place in scores[0]:
        images = [trials.places(fold)[place] for fold in range(len(scores))]
        before, after = (
            np.stack([_by_image(images, [of[place][m] for of in folds]) for m in METRICS])
            for folds in (trials.untouched, scores)
        )
        intervals = paired_intervals(before, after)
        changes[place] = {
            metric: Change(
                float(before[i].mean()),
                float(after[i].mean()),
                None if intervals is None else (float(intervals[i][0]), float(intervals[i][1])),
            )
            for i, metric in enumerate(METRICS)
        }
    return RecipeResult(recipe, steps, last, changes.pop(TRAINED), changes)


def _by_image(images: Sequence[Any], scores: Sequence[FloatArray]) -> FloatArray:
    """Mean score of each image over the folds in which it was searched."""
    of_image, values = np.concatenate(images), np.concatenate(scores)
    is_query = ~np.isnan(values)
    _, places = np.unique(of_image[is_query], return_inverse=True)
    means: FloatArray = np.bincount(places, values[is_query]) / np.bincount(places)
    return means
