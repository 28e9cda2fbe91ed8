"""A checkpoint of another run is refused, in words that name what differs."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml
from quick import quick_evaluation
from runs import LOSS, At, Killed, Run, arcface, kill, never, photos, plain_tower
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from pairclip import (
    AllPairsCosineLoss,
    ClassBalancedSampler,
    CollapseMonitor,
    CosinePairLoss,
    EarlyStopping,
    PairSampler,
    Tracker,
    VisionTower,
    WeightAverage,
    all_pairs_cosine_loss,
)
from pairclip.finetuner.identity import identity_of
from pairclip.towers import random_tower


def refusable(directory: Path) -> Run:
    run = Run(directory)
    run.tower.model[1].requires_grad_(False)
    run.fit |= {"max_steps": 2}
    run.finetuner |= {"callbacks": [WeightAverage(0.9), EarlyStopping("gap", patience=5)]}
    run.fit |= {"evaluate": quick_evaluation(photos()), "sampler": sampler_of(seed=0)}
    del run.fit["batch_size"]
    return run


def sampler_of(*, seed: int, classes: int = 3) -> ClassBalancedSampler:
    return ClassBalancedSampler(photos()[1], classes, 2, seed=seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("refused")
    refusable(directory).go()
    return directory


def tower_like(change: Callable[[VisionTower], object], **run: Any) -> Callable:
    def apply(of: Run) -> None:
        of.tower = plain_tower(**run)
        of.tower.model[1].requires_grad_(False)
        change(of.tower)

    return apply


def other_images(of: Run) -> None:
    of.data = (255 - photos()[0], photos()[1])


def one_more(of: Run) -> None:
    pixels, labels = photos()
    of.data = (np.concatenate([pixels, pixels[:3]]), [*labels, 0, 1, 2])
    of.fit["sampler"] = sampler_of(seed=0)


def names(of: Run) -> None:
    of.data = (photos()[0], ["abc"[label] for label in photos()[1]])


def other_labels(of: Run) -> None:
    labels = photos()[1]
    of.data = (photos()[0], [labels[1], labels[0], *labels[2:]])


def setting(**changes: Any) -> Callable[[Run], None]:
    def apply(of: Run) -> None:
        of.finetuner |= changes
        if "optimizer" in changes:
            del of.finetuner["learning_rate"]

    return apply


def loss(value: Any) -> Callable[[Run], None]:
    return lambda of: setattr(of, "loss", value)


def fitting(**changes: Any) -> Callable[[Run], None]:
    return lambda of: of.fit.update(changes)


def with_noise(tower: VisionTower) -> None:
    with torch.no_grad():
        tower.model[1].weight[0, 0] += 1e-6


def other_preprocess(tower: VisionTower) -> None:
    inner = tower.preprocess
    tower.preprocess = lambda image: inner(image) * 0.5


REFUSED = [
    # Another model.
    ("wider", tower_like(lambda t: None, size=9), "model.trained weights is"),
    ("another class", lambda of: setattr(of, "tower", clip_tower()), "model.class is 'Seq"),
    ("frozen weights", tower_like(with_noise), "model.frozen weights is"),
    ("all train", tower_like(lambda t: t.requires_grad_(True)), "model.frozen weights is"),
    ("others frozen", tower_like(lambda t: t.model[5].requires_grad_(False)), "model.trained w"),
    ("activation", tower_like(lambda t: None, activation=nn.ReLU()), "model."),
    # Another dataset.
    ("count", one_more, "dataset.images is 24 there and 27 here"),
    ("labels", other_labels, "dataset.labels is"),
    ("class names", names, r"dataset.class names is None there and \['a', 'b', 'c'\] here"),
    ("images", other_images, "dataset.some images, preprocessed is"),
    ("preprocess", tower_like(other_preprocess), "dataset.some images, preprocessed is"),
    # Another configuration.
    (
        "another loss",
        loss(AllPairsCosineLoss(negatives="linear")),
        "configuration.loss.*squared.* there and .*linear",
    ),
    ("no module", loss(all_pairs_cosine_loss), "configuration.loss.*all_pairs_cosine_loss"),
    ("rate", setting(learning_rate=2e-3), r"configuration.*0\.001.* there and .*0\.002"),
    ("decay", setting(weight_decay=0.3), r"configuration\..*0\.3"),
    ("warm-up", setting(warmup_ratio=0.5), r"warmup_ratio is 0\.1 there and 0\.5 here"),
    ("schedule", setting(schedule="linear"), "schedule is 'cosine' there and 'linear' here"),
    ("clipping", setting(max_grad_norm=None), r"max_grad_norm is 1\.0 there and None here"),
    ("seed", setting(seed=1), "configuration.seed is 0 there and 1 here"),
    ("precision", setting(precision="bf16"), "precision is 'no' there and 'bf16' here"),
    (
        "optimizer",
        setting(optimizer=lambda ps: torch.optim.SGD(ps, lr=1e-3)),
        "configuration.optimizer.*AdamW.* there and .*SGD",
    ),
    ("steps", fitting(max_steps=3), "configuration.steps is 2 there and 3 here"),
    (
        "sampler",
        fitting(sampler=sampler_of(seed=0, classes=2)),
        "configuration.sampler.*3.* there and .*2",
    ),
    ("seed of sampler", fitting(sampler=sampler_of(seed=1)), "configuration.sampler"),
    (
        "another sampler",
        fitting(sampler=BatchSampler(SequentialSampler(range(24)), 6, drop_last=True)),
        "configuration.sampler.*ClassBalancedSampler.* there and .*BatchSampler",
    ),
    (
        "one callback less",
        setting(callbacks=[WeightAverage(0.9)]),
        "configuration.callbacks",
    ),
    (
        "order of callbacks",
        setting(callbacks=[EarlyStopping("gap", patience=5), WeightAverage(0.9)]),
        "configuration.callbacks",
    ),
    (
        "decay of average",
        setting(callbacks=[WeightAverage(0.5), EarlyStopping("gap", patience=5)]),
        "0.9.* there and .*0.5",
    ),
    (
        "figure of early stop",
        setting(callbacks=[WeightAverage(0.9), EarlyStopping("recall_at_1", patience=5)]),
        "gap.* there and .*recall_at_1",
    ),
]


def clip_tower(*, heads: int = 2, activation: str = "quick_gelu") -> VisionTower:
    sizes = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1, "embedding_dim": 8}
    return random_tower(**sizes, heads=heads, hidden_act=activation)


def times(folder: Path) -> dict[Path, int]:
    """When each file was written; the lock is no content, and older filelocks empty it anew."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [pytest.param(*case, id=name) for name, *case in REFUSED],
)
def test_a_checkpoint_of_another_run_is_refused(saved: Path, change: Any, message: str) -> None:
    run = refusable(saved)
    change(run)
    files = times(saved)
    before = copy.deepcopy(run.tower.state_dict())
    with pytest.raises(
        ValueError, match=rf"^Checkpoint '.*step-00000002' is of another run: .*{message}.*\. Use"
    ):
        run.go()
    assert times(saved) == files
    for name, value in run.tower.state_dict().items():
        assert value.equal(before[name]), name


def test_the_same_run_is_not_refused(saved: Path) -> None:
    files = times(saved)
    assert len(refusable(saved).go().steps) == 2
    assert times(saved) == files


def test_a_callback_that_only_watches_may_be_another(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.fit |= {"max_steps": 1}
    for threshold, folder in ((0.9, "a"), (0.5, "b")):
        run.finetuner["callbacks"] = [
            CollapseMonitor(threshold),
            Tracker("tensorboard", tmp_path / folder),
        ]
        assert len(run.go().steps) == 1
    run.finetuner["callbacks"].pop()
    with pytest.raises(ValueError, match=r"configuration\.callbacks"):
        run.go()


@pytest.mark.parametrize("change", [{"heads": 4}, {"activation": "gelu"}])
def test_another_architecture_with_the_same_shapes_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    first.tower, second.tower = clip_tower(), clip_tower(**change)
    for run in (first, second):
        run.fit["max_steps"] = 1
    first.go()
    with pytest.raises(ValueError, match="is of another run: model"):
        second.go()


def squared(embeddings: Tensor, labels: Tensor, power: float = 1.0) -> Tensor:
    return LOSS(embeddings, labels) ** power


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (CosinePairLoss(), CosinePairLoss(negatives="squared"), "linear.* there and .*squared"),
        (
            CosinePairLoss(negatives="hinge", margin=0.1),
            CosinePairLoss(negatives="hinge", margin=0.2),
            r"margin.*0\.1.* there and .*0\.2",
        ),
        (arcface, lambda: pml.ArcFaceLoss(num_classes=3, embedding_size=8, margin=10), ""),
        (arcface, lambda: pml.CosFaceLoss(num_classes=3, embedding_size=8), "ArcFace.*CosFace"),
        (
            lambda: pml.TripletMarginLoss(margin=0.1),
            lambda: pml.TripletMarginLoss(margin=0.1, swap=True),
            "swap.*False.* there and .*True",
        ),
        (lambda: partial(squared, power=1.0), lambda: partial(squared, power=2.0), "power"),
    ],
)
def test_a_loss_with_other_settings_is_refused(
    tmp_path: Path, there: Any, here: Any, message: str
) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    first.loss, second.loss = (x if isinstance(x, nn.Module) else x() for x in (there, here))
    for run in (first, second):
        run.fit["max_steps"] = 1
    first.go()
    with pytest.raises(ValueError, match=rf"configuration\.loss.*{message}"):
        second.go()


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (
            lambda: BatchSampler(RandomSampler(range(24)), 6, drop_last=True),
            lambda: BatchSampler(SequentialSampler(range(24)), 6, drop_last=True),
        ),
        (lambda: PairSampler(photos()[1], 3), lambda: PairSampler(photos()[1], 3, seed=1)),
        (
            lambda: PairSampler(photos()[1], 4),
            lambda: PairSampler(photos()[1], 4, positive_fraction=0.25),
        ),
    ],
)
def test_another_sampler_is_refused(tmp_path: Path, there: Any, here: Any) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    first.fit |= {"sampler": there(), "max_steps": 1}
    second.fit |= {"sampler": here(), "max_steps": 1}
    for run in (first, second):
        del run.fit["batch_size"]
    first.go()
    with pytest.raises(ValueError, match=r"configuration\.sampler"):
        second.go()


@contextmanager
def warns_of_own_generators() -> Iterator[None]:
    with pytest.warns(UserWarning, match="a transform draws from a generator of its own") as caught:
        yield
    assert len(caught) == 1


def test_a_transform_with_a_generator_of_its_own_is_said_and_not_refused(tmp_path: Path) -> None:
    for steps in (1, 2):
        run = Run(tmp_path)
        inner, chance = run.tower.preprocess, np.random.default_rng()
        run.tower.preprocess = lambda image, inner=inner, chance=chance: (
            inner(image) * chance.random()
        )
        with warns_of_own_generators(), pytest.raises(Killed) if steps == 1 else nullcontext():
            history = run.go(At(3 if steps == 1 else -1, kill))
    assert len(history.steps) == 6


def test_a_generator_that_has_drawn_is_another_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    run = Run(tmp_path)
    sampler = RandomSampler(range(24), generator=generator)
    run.fit |= {"sampler": BatchSampler(sampler, 6, drop_last=True)}
    del run.fit["batch_size"]
    with pytest.raises(Killed):
        run.go(At(3, kill))
    with pytest.raises(ValueError, match=r"configuration\.sampler is .*generator="):
        run.go(never())
    generator.manual_seed(4)
    assert len(run.go(never()).steps) == 6


def scripted_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    return (embeddings * embeddings).sum()


def test_a_scripted_loss_is_a_loss() -> None:
    run = Run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        run.loss = torch.jit.script(scripted_loss)
    assert len(run.go().steps) == 6


def momentum_in_group(momentum: float) -> Any:
    return lambda ps: torch.optim.SGD([{"params": ps, "momentum": momentum}], lr=0.01)


def test_other_settings_of_a_parameter_group_are_refused(tmp_path: Path) -> None:
    for momentum in (0.1, 0.9):
        run = Run(tmp_path)
        run.finetuner = {"optimizer": momentum_in_group(momentum)}
        run.fit["max_steps"] = 1
        if momentum == 0.1:
            run.go()
    with pytest.raises(ValueError, match=r"configuration\..*momentum.*0\.1.* there and .*0\.9"):
        run.go()


def test_all_that_differs_is_named(saved: Path) -> None:
    run = refusable(saved)
    other_images(run)
    run.finetuner |= {"seed": 3, "schedule": "constant"}
    with pytest.raises(ValueError, match=r"images, preproc.*; .*schedule is 'cosine'.*; .*seed is"):
        run.go()


def test_checkpoints_are_not_trained_over(saved: Path) -> None:
    run = refusable(saved)
    run.fit["resume"] = False
    with pytest.raises(
        ValueError,
        match=rf"`checkpoint_dir` '{saved}' has checkpoints up to step 2 already.*resume=True",
    ):
        run.go()


def test_the_images_that_are_looked_at_are_in_the_largest_dataset_too() -> None:
    """2**24 + 4 images: float32 would round their last index up, beyond the end."""
    looked_at: list[int] = []

    class Data(SimpleNamespace):
        def __len__(self) -> int:
            return 2**24 + 4

    class Items:
        images = Data(labels=torch.zeros(1), class_names=None)

        def __getitems__(self, keys: Any) -> list[Any]:
            looked_at.extend(key.item for key in keys)
            return [(torch.zeros(1), 0, 0)] * len(keys)

    run = SimpleNamespace(
        tower=plain_tower(), optimizer=SimpleNamespace(param_groups=[]), peak_rates=[]
    )
    identity_of(run, Items(), None, {}, [])
    assert looked_at[0] == 0
    assert looked_at[-1] == 2**24 + 3
