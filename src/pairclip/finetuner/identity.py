"""What must be the same in two parts of one run: model, dataset, configuration."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from pairclip._files import bytes_of
from pairclip._randomness import random_state_kept
from pairclip._version import __version__
from pairclip.callbacks import Callback
from pairclip.checkpoints import trained_tensors
from pairclip.datasets import LabelledImages, StreamBatches
from pairclip.finetuner.batches import ItemKey, TrainingItems
from pairclip.finetuner.feeds import Feed
from pairclip.finetuner.settings import Plan, Settings
from pairclip.finetuner.step import Trainer
from pairclip.towers import VisionTower, tower_of
from pairclip.towers.adapters import plain_name, without_wrapper

_SAMPLED_ITEMS = 8
# Arguments that there were not always: at these values a checkpoint of before then resumes.
_ADDED_LATER = {"positive_margin": 1.0}


def config_of(trainer: Trainer, feed: Feed) -> dict[str, Any]:
    """What a fit was asked for, as plain values."""
    settings, kept = trainer.settings, feed.kept
    return {
        "loss": describe(trainer.loss),
        "sampler": describe(feed.sampler),
        "batches per epoch": feed.steps_per_epoch,
        "steps": trainer.num_steps,
        "optimizer": type(trainer.optimizer).__qualname__,
        "learning_rate": trainer.peak_rates[0],
        "warmup_ratio": settings.warmup_ratio,
        "schedule": settings.schedule,
        "precision": trainer.accelerator.mixed_precision,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        **({} if kept is None else {"images to keep in a batch": kept.per_batch}),
    }


def identity_of(
    trainer: Trainer,
    items: TrainingItems | StreamBatches,
    targets: Tensor | None,
    config: Mapping[str, Any],
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """What must be the same in a run that continues from a checkpoint, and a word for each.

    Warns:
        UserWarning: If images differ when they are loaded again, so that resuming isn't exact.
    """
    dataset = dataset_identity(items, targets)
    if dataset.get("some images, preprocessed", "") is None:
        warnings.warn(
            "`dataset` gives other pixels when the same images are loaded again: a transform draws "
            "from a generator of its own. A resumed run won't end in the same weights, and other "
            "images won't be refused. Let it draw from the global generators of Python, NumPy or "
            "torch, which are seeded for each image.",
            stacklevel=4,
        )
    return {
        "model": model_identity(trainer.tower),
        "dataset": dataset,
        "configuration": {
            **config,
            "parameter groups": parameter_groups(trainer),
            "callbacks": [describe(callback) for callback in callbacks],
        },
    }


def parameter_groups(trainer: Trainer) -> list[dict[str, Any]]:
    """Size and settings of each group of the optimizer."""
    groups = zip(trainer.optimizer.param_groups, trainer.peak_rates, strict=True)
    return [
        {"parameters": len(group["params"])}
        | {key: str(group[key]) for key in group if key not in ("params", "lr")}
        | {"learning rate": rate}
        for group, rate in groups
    ]


def model_identity(tower: nn.Module) -> dict[str, Any]:
    """What is the same in the same model, but for the values of what is trained."""
    frozen = {plain_name(n): p for n, p in tower.named_parameters() if not p.requires_grad}
    model = getattr(tower, "model", tower)
    return {
        "class": type(without_wrapper(model)).__qualname__,
        "settings": tower_of(tower).settings(),
        "modules": {
            # What is compiled comes after its wrapper, and takes its place.
            plain_name(name): f"{type(module).__qualname__}({module.extra_repr()})"
            for name, module in tower.named_modules()
        },
        "trained weights": _digest(
            {
                name: torch.tensor(t.shape, device="cpu")
                for name, t in trained_tensors(tower).items()
            }
        ),
        "frozen weights": _digest(frozen),
    }


def dataset_identity(
    items: TrainingItems | StreamBatches, targets: Tensor | None
) -> dict[str, Any]:
    """What is the same in the same images; None for pixels that are others each time."""
    if isinstance(items, StreamBatches):
        # What it gives is compared where it is read up to the place of a checkpoint.
        return {"stream": type(items.stream).__qualname__, "class names": items.class_names}
    images = items.images

    def read(chosen: list[int]) -> list[Tensor]:
        keys = [ItemKey(0, i, item) for i, item in enumerate(chosen)]
        return [pixels for pixels, *_ in items.__getitems__(keys)]

    return {
        "images": len(images),
        "labels": _digest({"labels": images.labels}),
        "class names": images.class_names,
        "some images, preprocessed": _digest_of_some(len(images), read),
        **({} if targets is None else {"targets": _digest({"targets": targets})}),
    }


def statement_of(
    tower: nn.Module,
    loss: object,
    settings: Settings,
    plan: Plan,
    feed: Feed,
    evaluated: LabelledImages | None,
) -> dict[str, Any]:
    """What a process is about to do, as far as all processes must do the same."""
    return {
        "versions": {"pairclip": __version__, "torch": str(torch.__version__).split("+")[0]},
        "tower": model_identity(tower),
        "dataset": dataset_identity(feed.items, feed.targets),
        "loss": describe(loss),
        "sampler": describe(feed.sampler),
        "batches per epoch": feed.steps_per_epoch,
        "settings": {name: _plain(value) for name, value in vars(settings).items()},
        "fit": {name: _plain(value) for name, value in vars(plan).items() if name != "num_workers"},
        "eval_dataset": None if evaluated is None else _evaluated(evaluated, tower_of(tower)),
    }


def _evaluated(images: LabelledImages, tower: VisionTower) -> dict[str, Any]:
    """What is the same in the same images to evaluate on; None for others each time."""

    def read(chosen: list[int]) -> list[Tensor]:
        values = [images[i][0] for i in chosen]
        return values if images.of_features else [tower.preprocess(value) for value in values]

    with random_state_kept():
        some = _digest_of_some(len(images), read)
    return {"labels": _digest({"labels": images.labels}), "some images": some}


def _plain(value: object) -> object:
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return str(value) if isinstance(value, Path) else value


def _digest_of_some(count: int, read: Callable[[list[int]], list[Tensor]]) -> str | None:
    """A digest of some of so many images, or None if they are others when they are read again."""
    chosen = [i * (count - 1) // (_SAMPLED_ITEMS - 1) for i in range(_SAMPLED_ITEMS)]
    first, again = (
        _digest({str(i): values for i, values in enumerate(read(chosen))}) for _ in range(2)
    )
    return first if first == again else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def describe(thing: Any) -> str:
    """Name and plain arguments of a loss, a sampler or a callback, whatever has become of it."""
    if isinstance(thing, partial):
        arguments = [*map(str, thing.args), *(f"{k}={v}" for k, v in thing.keywords.items())]
        return f"partial({', '.join([describe(thing.func), *arguments])})"
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    if getattr(thing, "only_watches", False):
        return str(name)
    return f"{name}({', '.join(f'{key}={value}' for key, value in _arguments(thing))})"


def _arguments(thing: Any) -> Iterator[tuple[str, Any]]:
    """What it was made with, where it keeps that under the argument's name."""
    try:
        names = list(signature(type(thing)).parameters)
    except ValueError:  # of a class that is not written in Python
        names = []
    for name in names:
        # What a callback keeps for itself changes as it works; a sampler's seed does not.
        private = None if isinstance(thing, Callback) else getattr(thing, f"_{name}", None)
        value = getattr(thing, name, private)
        if isinstance(value, (bool, int, float, str)):
            if _ADDED_LATER.get(name) != value:
                yield name, value
        elif isinstance(value, torch.Generator):
            # Not its seed: one that has drawn since then draws something else now.
            yield name, _digest({"state": value.get_state()})
        elif isinstance(value, Sampler):
            yield name, describe(value)
    if isinstance(thing, nn.Module):
        for name, child in thing.named_children():
            yield name, describe(child)
