"""Targets that go with their images, and images that are kept where they are."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import small
from runs import At, Killed, Run, assert_same, kill, never, photos, plain_tower
from torch import Tensor
from torch.utils.data import Subset

from pairclip import (
    AllPairsCosineLoss,
    ClassBalancedSampler,
    CollapseMonitor,
    CosinePairLoss,
    Finetuner,
    LabelledImages,
    PairSampler,
    PreservingLoss,
    TargetSimilarityLoss,
    cache_features,
    embed_images,
)
from pairclip.embedding import embed
from pairclip.finetuner import targets as targets_module
from pairclip.finetuner.images import FitImages, kept_deck
from pairclip.towers import random_tower

LOSS = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)
SIZES = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "embedding_dim": 8}


class Seen:
    """A loss that keeps what it is given; the targets are the indices of the images."""

    takes_targets = True

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], list[int]]] = []

    def __call__(self, embeddings: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        assert targets.dtype == torch.float32
        self.batches.append((labels.tolist(), targets[:, 0].int().tolist()))
        return embeddings.square().mean()


def numbers(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float64)[:, None]


@pytest.mark.parametrize("micro", [None, 5])
def test_the_gradient_is_that_of_the_pairs_of_embeddings_and_targets(micro: int | None) -> None:
    batches, targets = small.shuffled_batches(), small.targets()
    wanted = small.by_hand(small.new_tower(), small.naive_targets_loss, batches, targets=targets)
    found = small.fit(
        small.new_tower(),
        TargetSimilarityLoss(),
        small.Batches(batches),
        micro_batch_size=micro,
        fitting={"targets": targets},
    )
    small.assert_same_gradient(found[0], wanted[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_each_image_comes_with_its_own_targets(workers: int) -> None:
    pictures, labels = photos()
    chosen = [5, 3, 20, 1, 9, 14, 2, 7]
    seen = Seen()
    Finetuner(random_tower(**SIZES), seen).fit(
        Subset(LabelledImages((pictures, labels)), chosen),
        targets=numbers(8),
        batch_size=4,
        epochs=2,
        num_workers=workers,
    )
    for of_batch, rows in seen.batches:
        assert of_batch == [labels[chosen[row]] for row in rows]


def test_a_callback_sees_the_targets() -> None:
    watched = []
    pictures, labels = photos()
    callback = At(1, lambda: None)
    callback.on_step = lambda fit: watched.append((fit.labels, fit.targets))
    Finetuner(random_tower(**SIZES), Seen(), callbacks=[callback]).fit(
        (pictures, labels), targets=numbers(24), batch_size=6, max_steps=1
    )
    ((of_batch, targets),) = watched
    assert of_batch.tolist() == [labels[int(row)] for row in targets[:, 0]]


# Images to keep


def test_each_batch_has_its_share_of_images_to_keep_and_all_come_equally_often() -> None:
    pictures, labels = photos()
    seen = Seen()
    finetuner = Finetuner(random_tower(**SIZES), seen)
    history = finetuner.fit(
        (pictures, labels),
        keep=pictures[:10],
        targets=numbers(34),
        keep_share=0.25,
        batch_size=8,
        epochs=5,
    )
    assert len(history.steps) == 20  # of six labelled images each: the epoch is theirs
    dealt: Counter[int] = Counter()
    for of_batch, rows in seen.batches:
        assert [label == -1 for label in of_batch] == [row >= 24 for row in rows]
        kept = [row for row in rows if row >= 24]
        assert len(kept) == len(set(kept)) == 2
        assert of_batch[:6] == [labels[row] for row in rows[:6]]
        dealt.update(kept)
    assert dealt == {row: 4 for row in range(24, 34)}


def test_to_the_batches_of_a_sampler_they_are_added() -> None:
    seen = Seen()
    pictures, labels = photos()
    sampler = PairSampler(labels, 3)
    Finetuner(random_tower(**SIZES), seen).fit(
        (pictures, labels), sampler=sampler, keep=pictures, targets=numbers(48), keep_share=0.4
    )
    assert len(seen.batches) == len(sampler)
    assert {len(rows) for _, rows in seen.batches} == {6 + 4}


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_deck_is_dealt_over_epochs(epochs: int) -> None:
    images = FitImages(LabelledImages(photos()), photos()[0][:7])
    deck = kept_deck(images, 0.5, None, 8, seed=3)
    rows = [row for epoch in range(epochs) for row in deck.epoch(epoch, 3)]
    counts = Counter(index for row in rows for index in row)
    assert set(counts.values()) <= {12 * epochs // 7, 12 * epochs // 7 + 1}
    assert set(counts) <= set(range(24, 31))
    assert deck.epoch(0, 3) != deck.epoch(1, 3)
    assert deck.epoch(1, 3) == kept_deck(images, 0.5, None, 8, seed=3).epoch(1, 3)


def test_without_targets_a_loss_that_preserves_gets_those_of_the_untouched_tower() -> None:
    pictures, labels = photos()
    tower = random_tower(**SIZES)
    given, own = copy.deepcopy(tower), tower
    rows = embed_images(tower, pictures)
    for of, targets in ((given, torch.cat([rows, rows[:9]])), (own, None)):
        finetuner = Finetuner(of, PreservingLoss(LOSS, weight=0.5), learning_rate=1e-2)
        finetuner.fit(
            (pictures, labels), keep=pictures[:9], targets=targets, batch_size=8, max_steps=4
        )
    assert_same(own, given)
    assert not own.state_dict().keys() - given.state_dict().keys()
    moved = (embed_images(own, pictures) - rows).norm()
    bare = random_tower(**SIZES)
    Finetuner(bare, LOSS, learning_rate=1e-2).fit((pictures, labels), batch_size=6, max_steps=4)
    assert 0 < moved < (embed_images(bare, pictures) - rows).norm()


@pytest.mark.parametrize("shuffled", [False, True])
def test_less_than_an_epoch_embeds_only_what_it_draws(
    shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, labels = photos()
    tower = random_tower(**SIZES)
    given, own = copy.deepcopy(tower), tower
    embedded = []

    def counted(tower: Any, images: Any, **options: Any) -> Tensor:
        embedded.append(len(images))
        return embed(tower, images, **options)

    monkeypatch.setattr(targets_module, "embed", counted)
    for of, targets in ((given, embed_images(tower, pictures)), (own, None)):
        sampler: Any = ClassBalancedSampler(labels, 2, 2)
        if shuffled:  # what someone else's sampler draws can't be known before
            sampler = type("Other", (ClassBalancedSampler,), {})(labels, 2, 2)
        finetuner = Finetuner(of, PreservingLoss(LOSS, weight=0.5), learning_rate=1e-2)
        finetuner.fit((pictures, labels), sampler=sampler, targets=targets, max_steps=3)
    assert_same(own, given)
    sampler.set_epoch(0)
    drawn = {item for _, batch in zip(range(3), sampler, strict=False) for item in batch}
    assert len(drawn) < len(pictures)
    assert embedded == [len(pictures) if shuffled else len(drawn)]


def test_features_of_a_trunk_have_targets_and_may_be_kept(tmp_path: Path) -> None:
    pictures, labels = photos()
    tower = random_tower(**SIZES)
    whole = copy.deepcopy(tower)
    trunk, head = tower.split(1)
    features = cache_features(trunk, (pictures, labels), tmp_path, dtype=torch.float32)
    kept = cache_features(trunk, (pictures[:6], labels[:6]), tmp_path, dtype=torch.float32)
    losses = []
    for of, data, keep in ((whole, (pictures, labels), pictures[:6]), (head, features, kept)):
        of.requires_grad_(True)
        finetuner = Finetuner(of, PreservingLoss(LOSS, weight=0.5), learning_rate=1e-3)
        history = finetuner.fit(data, keep=keep, batch_size=8, max_steps=1)
        losses.append(history.steps[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match="`keep` must be of the same kind as `dataset`"):
        finetuner.fit(features, keep=pictures, batch_size=8)


# Resumed


def preserving(directory: Path) -> Run:
    run = Run(directory)
    run.tower = plain_tower()
    run.loss = PreservingLoss(LOSS, weight=0.5)
    run.fit |= {"batch_size": 8, "keep": photos()[0][::-1].copy()}
    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_has_the_targets_of_the_first_start(tmp_path: Path, workers: int) -> None:
    whole, part, rest = (preserving(tmp_path / name) for name in ("whole", "parts", "parts"))
    expected = whole.go(never())
    with pytest.raises(Killed):
        part.go(At(3, kill))
    rest.tower = part.tower  # as in a notebook: not untouched any more
    rest.fit["num_workers"] = workers
    assert rest.go(never()) == expected
    assert_same(rest.tower, whole.tower)


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_without_the_targets_of_the_first_start_a_run_does_not_go_on(
    tmp_path: Path, damage: str
) -> None:
    with pytest.raises(Killed):
        preserving(tmp_path).go(At(3, kill))
    file = tmp_path / "targets.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-8] + b"12345678" * (damage == "other"))
    message = {"other": "is of another run: dataset.targets is"}.get(damage, "can't be read")
    with pytest.raises(ValueError, match=message):
        preserving(tmp_path).go(never())
    file.write_bytes(content)
    assert len(preserving(tmp_path).go(never()).steps) == 6


def test_other_targets_and_other_images_to_keep_are_another_run(tmp_path: Path) -> None:
    def run(**changes: Any) -> Run:
        of = Run(tmp_path)
        of.loss = TargetSimilarityLoss()
        of.fit |= {"max_steps": 1, "batch_size": 8, "keep": photos()[0], "keep_share": 0.25}
        of.fit |= {"targets": numbers(48)} | changes
        return of

    run().go()
    assert len(run().go().steps) == 1
    for changes, message in [
        ({"targets": numbers(48) + 1}, "dataset.targets is"),
        ({"keep": photos()[0] // 2}, "dataset.some images, preprocessed is"),
        ({"keep": photos()[0][:20], "targets": numbers(44)}, "dataset.images is 48 there and 44"),
        ({"keep_share": 0.5}, "configuration.images to keep in a batch is 2 there and 4 here"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**changes).go()


# Refused


@pytest.mark.parametrize(
    ("loss", "arguments", "error", "message"),
    [
        (LOSS, {"targets": numbers(24)}, ValueError, "`targets` would be ignored: `loss` AllPairs"),
        (TargetSimilarityLoss(), {}, ValueError, "TargetSimilarityLoss takes targets. Give `targ"),
        (Seen(), {"targets": numbers(23)}, ValueError, "got 23 rows for 24 images of `dataset`"),
        (
            Seen(),
            {"targets": numbers(24), "keep": photos()[0][:4]},
            ValueError,
            "got 24 rows for 24 images of `dataset` and 4 to keep",
        ),
        (Seen(), {"targets": [1.0] * 24}, TypeError, "`targets` must be a tensor or a NumPy array"),
        (Seen(), {"targets": numbers(24)[:, 0]}, ValueError, r"`targets` must have shape \[N, D\]"),
        (
            Seen(),
            {"targets": numbers(24) + np.nan},
            ValueError,
            "`targets` has NaN or infinite",
        ),
        (LOSS, {"keep": photos()[0]}, ValueError, "`keep` has images of no class, and `loss` All"),
        (Seen(), {"keep_share": 0.5, "targets": numbers(24)}, ValueError, "there is no `keep`"),
        (
            Seen(),
            {"keep": photos()[0], "targets": numbers(48), "keep_share": 1.0},
            ValueError,
            r"`keep_share` must be in \(0, 1\), got 1",
        ),
        (
            Seen(),
            {"keep": photos()[0], "targets": numbers(48), "keep_share": 0.01},
            ValueError,
            "`keep_share` 0.01 of a batch of 8 images is 0 images to keep",
        ),
        (
            Seen(),
            {"keep": photos()[0][:1], "targets": numbers(25), "keep_share": 0.5},
            ValueError,
            "is 4 different images in each batch, and `keep` has 1",
        ),
    ],
)
def test_what_does_not_fit_together(loss: Any, arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Finetuner(random_tower(**SIZES), loss).fit(photos(), batch_size=8, **arguments)


def test_a_sampler_without_a_batch_size_has_no_share(tower: Any) -> None:
    sampler = small.Batches([[0, 1, 2]])
    with pytest.raises(TypeError, match="a share of the sampler's `batch_size`, and `sampler` Bat"):
        Finetuner(tower, Seen()).fit(
            photos(), keep=photos()[0], targets=numbers(48), sampler=sampler
        )


def test_a_loss_takes_pairs_or_targets() -> None:
    loss = CosinePairLoss()
    loss.takes_targets = True
    with pytest.raises(ValueError, match="`loss` CosinePairLoss takes pairs and targets"):
        Finetuner(random_tower(**SIZES), loss).fit(photos(), targets=numbers(24))


def test_a_dataset_with_negative_labels_keeps_no_images() -> None:
    pictures, labels = photos()
    labels = [label - 5 for label in labels]
    with pytest.raises(ValueError, match="`dataset` has the label -5, and with `keep` a negative"):
        Finetuner(random_tower(**SIZES), Seen()).fit(
            (pictures, labels), keep=pictures, targets=numbers(48)
        )


def test_the_monitor_looks_at_images_that_have_a_class() -> None:
    pictures, labels = photos()
    finetuner = Finetuner(
        random_tower(**SIZES),
        PreservingLoss(LOSS, weight=0.5),
        callbacks=[CollapseMonitor(threshold=0.9999)],
    )
    finetuner.fit((pictures, labels), keep=pictures, batch_size=8, max_steps=1)
    with (
        pytest.warns(UserWarning, match="all 6 images of the batch are of one class"),
        pytest.warns(UserWarning, match="Of 1 batches looked at: 1 batches of one class"),
    ):
        finetuner.fit(
            (pictures, [0] * 24),
            keep=pictures,
            sampler=PairSampler([0] * 24, 3, positive_fraction=1.0),
            keep_share=0.25,
            max_steps=1,
        )
