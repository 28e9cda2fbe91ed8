"""Recipes: what they check, how folds and rounds divide, and the verdict."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss

from pairclip import (
    AllPairsCosineLoss,
    Recipe,
    compare_recipes,
    default_recipes,
    embed_images,
    load_tower,
    tune,
)
from pairclip.evaluation import Change
from pairclip.recipes import RecipeComparison, RecipeResult
from pairclip.recipes.comparing import _by_image
from pairclip.recipes.folds import divide
from pairclip.recipes.halving import order, rungs
from pairclip.towers import random_tower

LABELS = np.repeat(np.arange(6), 10)


def images(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Six classes of ten images that a tower can learn to tell apart: bars, each at its place."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 120, (60, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(pixels, LABELS, strict=True):
        image[:, 2 * label : 2 * label + 3] += 120
    return pixels, LABELS


SMALL: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, r"`learning_rate` must be in \(0, inf\), got 0"),
        ({"learning_rate": float("nan")}, r"`learning_rate` must be in \(0, inf\), got nan"),
        ({"preserve_embeddings": -1.0}, r"`preserve_embeddings` must be in \[0, inf\)"),
        ({"preserve_similarities": -0.5}, r"`preserve_similarities` must be in \[0, inf\)"),
        ({"blend": 0.0}, r"`blend` must be in \(0, 1\], got 0\.0\. With 0 nothing"),
        ({"blend": 1.5}, r"`blend` must be in \(0, 1\]"),
        ({"steps": 0}, "`steps` must"),
        ({"batch_size": 0}, "`batch_size` must"),
        ({"train_blocks": -1}, "`train_blocks` must"),
        ({"lora_rank": 0}, "`lora_rank` must"),
        ({"keep_share": 1.0, "preserve_embeddings": 1.0}, r"`keep_share` must be in \[0, 1\)"),
        ({"keep_share": 0.5}, "`keep_share` 0.5 would be ignored"),
    ],
)
def test_recipes_refuse_what_is_wrong(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe("wrong", **wrong)


def test_folds_train_on_nothing_that_they_evaluate() -> None:
    labels = np.repeat(np.arange(9), 20)
    folds = divide(labels, folds=3, held_out_classes=2, images_per_class=100, seed=0)
    for fold in folds:
        parts = [set(fold.train.tolist()), set(fold.trained.tolist()), set(fold.left_out.tolist())]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(labels)
        assert len(np.unique(labels[fold.left_out])) == 2
        assert set(labels[fold.train]) == set(labels[fold.trained])
        assert not set(labels[fold.train]) & set(labels[fold.left_out])
        assert np.bincount(labels[fold.trained]).max() == 4  # a fifth
    left = [set(labels[fold.left_out].tolist()) for fold in folds]
    assert not (left[0] & left[1])
    assert not (left[0] & left[2])
    assert not (left[1] & left[2])
    # Other images are held out in each fold.
    assert not set(folds[0].trained.tolist()) & set(folds[1].trained.tolist())


def test_folds_evaluate_no_more_images_of_a_class_than_allowed_and_train_on_small_classes() -> None:
    labels = np.concatenate([np.repeat(np.arange(5), 50), [5, 5, 5], [6]])
    (fold,) = divide(labels, folds=1, held_out_classes=0, images_per_class=7, seed=1)
    assert np.bincount(labels[fold.trained], minlength=7).tolist() == [7] * 5 + [0, 0]
    assert np.bincount(labels[fold.train], minlength=7).tolist() == [43] * 5 + [3, 0]
    assert not len(fold.left_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_classes": 1}, "`held_out_classes` must be 0, or from 2 to 4 of the 6 classes"),
        ({"held_out_classes": 5}, "`held_out_classes` must be 0, or from 2 to 4"),
        ({"folds": 4}, "`folds` 4 times 2 classes left out are more than the 6 classes"),
    ],
)
def test_folds_say_what_is_too_much(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divide(
            LABELS, **{"folds": 1, "held_out_classes": None, **options}, images_per_class=9, seed=0
        )


def test_rounds_halve_the_recipes_and_double_their_length() -> None:
    outcome = rungs([600] * 5, folds=2, budget=None)
    assert [(rung.contenders, rung.steps(600)) for rung in outcome] == [
        (5, 150),
        (3, 300),
        (2, 600),
    ]
    assert [(r.contenders, r.steps(600)) for r in rungs([600], folds=1, budget=None)] == [(1, 600)]
    assert [(r.contenders, r.steps(9)) for r in rungs([9, 9], folds=1, budget=None)] == [(2, 9)]


def test_rounds_fit_their_budget_whoever_goes_on() -> None:
    lengths = [600, 100, 100, 300]
    outcome = rungs(lengths, folds=3, budget=900)
    longest = sorted(lengths, reverse=True)
    spent = sum(3 * sum(map(rung.steps, longest[: rung.contenders])) for rung in outcome)
    assert 800 < spent <= 900
    assert rungs(lengths, folds=3, budget=10**6) == rungs(lengths, folds=3, budget=None)
    with pytest.raises(ValueError, match="`budget` must be at least 18 steps"):
        rungs(lengths, folds=3, budget=17)


def test_recipes_within_the_limit_come_first_then_those_that_gain_most() -> None:
    assert order([0.1, 0.3, 0.2, 0.5], [-0.2, 0.01, -0.1, 0.02]) == [2, 0, 1, 3]


def test_scores_of_an_image_are_averaged_over_folds() -> None:
    places = [np.array([3, 5, 8]), np.array([5, 9])]
    scores = [np.array([0.5, 0.2, np.nan]), np.array([0.4, 1.0])]
    np.testing.assert_allclose(_by_image(places, scores), [0.5, 0.3, 1.0])


def result(name: str, gain: float, low: float, lost: float, finalist: bool = True) -> RecipeResult:
    up = Change(0.4, 0.4 + gain, (low, 2 * gain - low))
    down = Change(0.4, 0.4 - lost, (-lost - 0.1, 0.1 - lost))
    trained = {"recall_at_1": up, "mean_average_precision": up}
    elsewhere = {"recall_at_1": down, "mean_average_precision": down}
    return RecipeResult(Recipe(name), 600, finalist, trained, {"classes left out": elsewhere})


def test_the_verdict_is_the_best_that_is_sure_and_within_the_limit() -> None:
    some = [
        result("bold", 0.3, 0.2, 0.05),
        result("unsure", 0.25, -0.01, 0.0),
        result("sound", 0.2, 0.1, 0.01),
        result("small", 0.1, 0.05, -0.02),
        result("early", 0.9, 0.8, 0.0, finalist=False),
    ]
    outcome = RecipeComparison(some, limit=0.02)
    assert outcome.best is not None
    assert outcome.best.name == "sound"
    assert outcome.verdict.startswith("Take 'sound': it gains 0.200 mAP (+0.100 to +0.300)")
    assert "elsewhere mAP falls by 0.010" in outcome.verdict
    wide = RecipeComparison(some, limit=0.05)
    assert wide.best is not None
    assert wide.best.name == "bold"


def test_the_verdict_may_be_no() -> None:
    outcome = RecipeComparison(
        [result("bold", 0.3, 0.2, 0.05), result("unsure", 0.25, -0.01, 0.0)], limit=0.01
    )
    assert outcome.best is None
    assert outcome.verdict == (
        "Leave the tower as it is. 'bold' gains 0.300 mAP (+0.200 to +0.400), but elsewhere mAP "
        "falls by 0.050, more than the limit of 0.01. 'unsure' gains 0.250 mAP (-0.010 to +0.510), "
        "which may be nothing."
    )
    table = outcome.to_markdown().splitlines()
    assert table[0].startswith("| recipe | steps | trained, R@1 | trained, mAP | classes left out")
    assert table[2] == "| untouched | 0 | 0.400 | 0.400 | 0.400 | 0.400 |"
    assert "**+0.300** (+0.200 to +0.400)" in table[3]
    assert "| -0.050 (-0.150 to +0.050) |" in table[3]
    assert table[-1] == outcome.verdict


def test_a_comparison_trains_evaluates_and_goes_on_where_it_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = random_tower()
    before = tower.fingerprint()
    recipes = [
        Recipe("learns", steps=30, **SMALL),
        Recipe("half", steps=30, **SMALL, blend=0.5),
        Recipe("gentle", steps=30, **SMALL, preserve_embeddings=1.0, preserve_similarities=1.0),
    ]
    options: dict[str, Any] = {"folds": 1, "held_out_classes": 2, "budget": 75, "limit": 1.0}
    outcome = compare_recipes(
        tower, images(), recipes, folder=tmp_path, others=images(1), **options
    )
    assert tower.fingerprint() == before
    assert [(r.steps, r.finalist) for r in outcome.results] == [(21, True), (21, True), (10, False)]
    assert set(outcome.results[0].elsewhere) == {"classes left out", "others"}
    assert outcome.results[0].trained["recall_at_1"].before == pytest.approx(
        outcome.results[1].trained["recall_at_1"].before
    )
    saved = json.loads(json.dumps(outcome.to_dict()))
    assert saved["verdict"] == outcome.verdict
    assert saved["results"][0]["recipe"]["steps"] == 30

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("pairclip.recipes.trials.train", never)
    again = compare_recipes(tower, images(), recipes, folder=tmp_path, others=images(1), **options)
    assert again == outcome
    with pytest.raises(AssertionError, match="trained again"):  # of other images
        compare_recipes(tower, images(2), recipes, folder=tmp_path, others=images(1), **options)


def test_kept_trials_are_of_the_very_loss(tmp_path: Path) -> None:
    tower, options = random_tower(), {"folds": 1, "folder": tmp_path, "held_out_classes": 2}
    nothing = [Recipe(name, lambda z, _: 0 * z.sum(), steps=1, **SMALL) for name in "ab"]
    with pytest.raises(ValueError, match=r"'a' and 'b' have losses .* told apart, .*lambda"):
        compare_recipes(tower, images(), nothing, **options)
    recipes = [Recipe(name, ProxyAnchorLoss(6, 12), steps=1, **SMALL) for name in "ab"]
    compare_recipes(tower, images(), recipes, **options)
    notes = list(tmp_path.glob("trial-*.json"))
    assert len(notes) == 2
    for note in notes:
        read = json.loads(note.read_text())
        note.write_text(json.dumps(read | {"fold": 1}))
    with pytest.raises(ValueError, match="is damaged: it holds no trial"):
        compare_recipes(tower, images(), recipes, **options)


def test_recipes_that_differ_in_their_blend_are_one_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pairclip.recipes import trials

    trained = []

    def counted(recipe: Recipe, *args: Any, **options: Any) -> Any:
        trained.append(recipe.name)
        return train(recipe, *args, **options)

    train = trials.train
    monkeypatch.setattr(trials, "train", counted)
    recipes = [Recipe(f"{blend}", steps=2, **SMALL, blend=blend) for blend in (0.5, 1.0)]
    compare_recipes(random_tower(), images(), recipes, folds=1)
    assert trained == ["0.5"]


def test_a_trunk_that_is_computed_once_changes_nothing(tmp_path: Path) -> None:
    tower = random_tower(depth=2)
    recipes = [Recipe("last", steps=2, **SMALL, train_blocks=1, blend=0.5)]
    whole, cached = (
        compare_recipes(tower, images(), recipes, folds=1, others=images(1), **options)
        for options in ({}, {"folder": tmp_path, "cache_trunk": True})
    )
    assert len(list((tmp_path / "features").iterdir())) == 2
    for one, other in zip(whole.results, cached.results, strict=True):  # float16 rounds
        assert one.gain.after == pytest.approx(other.gain.after, abs=0.02)
        assert one.loss == pytest.approx(other.loss, abs=0.02)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_trunk": True}, ValueError, "`cache_trunk` needs a `folder`"),
        ({"recipes": []}, ValueError, "`recipes` is empty"),
        ({"recipes": ["plain"]}, TypeError, "`recipes` must be a list of `Recipe`"),
        ({"recipes": [Recipe("a"), Recipe("a")]}, ValueError, r"different names, got \['a'\]"),
        ({"held_out_classes": 0}, ValueError, "`held_out_classes` 0 needs `others`"),
        (
            {"recipes": [Recipe("a")], "keep": np.zeros((2, 8, 8, 3), np.uint8)},
            ValueError,
            "`keep` would be ignored",
        ),
        (
            {"recipes": [Recipe("k", preserve_embeddings=1.0, keep_share=0.5)]},
            ValueError,
            r"Recipes \['k'\] have a `keep_share`",
        ),
    ],
)
def test_a_comparison_refuses_what_is_wrong(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare_recipes(random_tower(), images(), **options)


def test_tune_changes_a_copy_of_what_trains_alone() -> None:
    tower = random_tower(depth=3)
    recipe = Recipe("last", steps=2, **SMALL, train_blocks=1, blend=0.5)
    tuned = tune(tower, images(), recipe)
    changed = {
        name.split("layers.")[-1][0]
        for (name, was), now in zip(tower.named_parameters(), tuned.parameters(), strict=True)
        if "layers." in name and not torch.equal(was, now)
    }
    assert changed == {"2"}
    whole = tune(tower, images(), replace(recipe, blend=1.0))
    for was, half, now in zip(
        tower.parameters(), tuned.parameters(), whole.parameters(), strict=True
    ):
        torch.testing.assert_close(half, (was + now) / 2)


def test_what_is_preserved_moves_less() -> None:
    tower, data = random_tower(), images()
    before = torch.nn.functional.normalize(embed_images(tower, data))
    others = images(1)[0]
    recipes = [
        Recipe("plain", steps=8, **SMALL),
        Recipe("embeddings", steps=8, **SMALL, preserve_embeddings=10.0),
        Recipe("kept", steps=8, **SMALL, preserve_embeddings=10.0, keep_share=0.5),
        Recipe("similarities", steps=8, **SMALL, preserve_similarities=10.0),
    ]
    moved = {}
    for recipe in recipes:
        keep = others if recipe.keep_share else None
        tuned = tune(tower, data, recipe, keep=keep)
        after = torch.nn.functional.normalize(embed_images(tuned, data))
        moved[recipe.name] = (
            float((before - after).norm(dim=1).mean()),
            float((before @ before.T - after @ after.T).square().mean()),
        )
    assert moved["embeddings"][0] < 0.5 * moved["plain"][0]
    assert moved["kept"][0] < 0.5 * moved["plain"][0]
    assert moved["similarities"][1] < 0.25 * moved["plain"][1]


def test_tune_merges_low_rank_adapters_of_the_last_blocks() -> None:
    pytest.importorskip("peft")
    tower = random_tower(depth=2)
    tuned = tune(tower, images(), Recipe("low rank", steps=2, **SMALL, lora_rank=2, train_blocks=1))
    names = [name for name, _ in tower.named_parameters()]
    assert [name for name, _ in tuned.named_parameters()] == names
    changed = [
        name
        for (name, was), now in zip(tower.named_parameters(), tuned.parameters(), strict=True)
        if not torch.equal(was, now)
    ]
    assert changed
    assert all("layers.1" in name for name in changed)
    for count in (0, 3):
        recipe = Recipe("low rank", steps=2, **SMALL, lora_rank=2, train_blocks=count)
        with pytest.raises(ValueError, match=rf"from 1 to 2, the tower's blocks, .*got {count}"):
            tune(tower, images(), recipe)
    with pytest.raises(TypeError, match=r"`recipe` must be a `Recipe`, got None\. The `best`"):
        tune(tower, images(), None)


def test_default_recipes_fit_the_tower() -> None:
    small = default_recipes(random_tower())
    assert {recipe.learning_rate for recipe in small} == {6e-4}
    assert len({recipe.name for recipe in small}) == len(small) == 5
    plain = load_tower(torch.nn.Flatten(), image_processor=lambda _: torch.zeros(3, 8, 8))
    assert all(recipe.train_blocks is None for recipe in default_recipes(plain))


def test_a_description_tells_losses_apart() -> None:
    one = Recipe("a", loss=AllPairsCosineLoss(negatives="hinge", margin=0.2)).to_dict()
    other = Recipe("a", loss=AllPairsCosineLoss(negatives="hinge", margin=0.5)).to_dict()
    assert one["loss"] != other["loss"]
    assert Recipe("a").to_dict()["loss"].startswith("AllPairsCosineLoss(")
