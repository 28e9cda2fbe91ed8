"""When a fit writes checkpoints, what is in them, and how it continues from one."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Sampler

from pairclip._batches import BatchSampler, ItemKey, TrainingItems
from pairclip._run import Run
from pairclip._tensors import bytes_of
from pairclip.callbacks import Callback, FitState
from pairclip.checkpoints import (
    Checkpoint,
    copy_into,
    differences,
    newest_checkpoint,
    remove_leftovers,
    trained_tensors,
    write_checkpoint,
)
from pairclip.towers.base import tower_of

_SAMPLED_ITEMS = 8


class Saver:
    """The checkpoints of one fit."""

    def __init__(
        self,
        directory: Path,
        *,
        every: int,
        keep: int,
        run: Run,
        fit: FitState,
        callbacks: Sequence[Callback],
        identity: Mapping[str, Any],
    ) -> None:
        self.directory = directory
        self.every = every
        self.keep = keep
        self.run = run
        self.fit = fit
        self.callbacks = callbacks
        self.identity = dict(identity)

    def resume(self, *, wanted: bool) -> None:
        """Put everything where the newest whole checkpoint left it.

        Raises:
            ValueError: If there are checkpoints and none is `wanted`, or the newest is of another
                model, dataset or configuration.
            OSError: If the folder can't be made.
        """
        if self.run.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.directory)
        checkpoint = self._newest()
        if checkpoint is None:
            return
        if not wanted:
            raise ValueError(
                f"`checkpoint_dir` '{self.directory}' has checkpoints up to step "
                f"{checkpoint.step} already. Continue from them with resume=True, or choose "
                "another folder."
            )
        state = checkpoint.state()
        different = list(differences(state["identity"], self.identity))
        if different:
            raise ValueError(
                f"Checkpoint '{checkpoint.folder}' is of another run: {'; '.join(different)}. "
                "Use the same model, dataset and settings, or another `checkpoint_dir`."
            )
        weights = state["weights"] if state["weights"] is not None else checkpoint.weights()
        copy_into(trained_tensors(self.run.tower), weights)
        self.run.load_state_dict(state["run"])
        for callback, its_state in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(its_state)
        self.fit.step = checkpoint.step
        self.fit.steps.extend(state["steps"])
        self.fit.evaluations.extend(state["evaluations"])
        self.fit.stop_reason = state["stop_reason"]

    def _newest(self) -> Checkpoint | None:
        accelerator = self.run.accelerator
        found = newest_checkpoint(self.directory) if accelerator.is_main_process else None
        if accelerator.num_processes == 1:
            return found
        (step,) = broadcast_object_list([None if found is None else found.step])
        if step is None or found is not None:
            return found
        folder = self.directory / f"step-{step:08d}"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"Process {accelerator.process_index} does not see '{folder}'. Let "
                "`checkpoint_dir` be in a file system that all machines share."
            )
        return Checkpoint(folder, step, None)

    def save(self) -> None:
        """Write a checkpoint of the present step; a disk that fails is said, and training goes on.

        Warns:
            UserWarning: If it could not be written.
        """
        fit, run = self.fit, self.run
        if run.accelerator.is_main_process:
            newest = fit.evaluations[-1] if fit.evaluations else {"step": 0}
            fresh = newest["step"] == fit.step
            figure = newest["mean_average_precision"] if fresh else None
            weights = trained_tensors(run.tower)
            state = {
                # The weights are those that were evaluated, so others are kept apart.
                "weights": None if fit.averages is None else weights,
                "identity": self.identity,
                "run": run.state_dict(),
                "callbacks": [callback.state_dict() for callback in self.callbacks],
                "steps": fit.steps,
                "evaluations": fit.evaluations,
                "stop_reason": fit.stop_reason,
            }
            try:
                write_checkpoint(
                    self.directory,
                    fit.step,
                    weights=weights if fit.averages is None else _averaged(weights, fit),
                    state=state,
                    figure=figure,
                    keep=self.keep,
                )
            except OSError as error:
                warnings.warn(
                    f"The checkpoint of step {fit.step} could not be written, and training goes "
                    f"on without it: {error}. Earlier checkpoints are as they were.",
                    stacklevel=3,
                )
        run.accelerator.wait_for_everyone()


def config_of(run: Run, sampler: BatchSampler) -> dict[str, Any]:
    """What a fit was asked for, as plain values."""
    settings = run.settings
    return {
        "loss": _describe(settings.loss),
        "sampler": _describe(sampler),
        "batches per epoch": len(sampler),
        "steps": run.num_steps,
        "optimizer": type(run.optimizer).__qualname__,
        "learning_rate": run.peak_rates[0],
        "warmup_ratio": settings.warmup_ratio,
        "schedule": settings.schedule,
        "precision": run.accelerator.mixed_precision,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
    }


def identity_of(
    run: Run, items: TrainingItems, config: Mapping[str, Any], callbacks: Sequence[Callback]
) -> dict[str, Any]:
    """What must be the same in a run that continues from a checkpoint, and a word for each.

    Warns:
        UserWarning: If images differ when they are loaded again, so that resuming isn't exact.
    """
    tower, data = run.tower, items.data
    frozen = {name: p for name, p in tower.named_parameters() if not p.requires_grad}
    chosen = [i * (len(data) - 1) // (_SAMPLED_ITEMS - 1) for i in range(_SAMPLED_ITEMS)]
    keys = [ItemKey(0, i, item) for i, item in enumerate(chosen)]
    pixels: str | None = _digest_of_items(items, keys)
    if pixels != _digest_of_items(items, keys):
        pixels = None
        warnings.warn(
            "`dataset` gives other pixels when the same images are loaded again: a transform draws "
            "from a generator of its own. A resumed run won't end in the same weights, and other "
            "images won't be refused. Let it draw from the global generators of Python, NumPy or "
            "torch, which are seeded for each image.",
            stacklevel=4,
        )
    return {
        "model": {
            "class": type(getattr(tower, "model", tower)).__qualname__,
            "settings": tower_of(tower).settings(),
            "modules": {
                name: f"{type(module).__qualname__}({module.extra_repr()})"
                for name, module in tower.named_modules()
            },
            "trained weights": _digest(
                {name: torch.tensor(t.shape) for name, t in trained_tensors(tower).items()}
            ),
            "frozen weights": _digest(frozen),
        },
        "dataset": {
            "images": len(data),
            "labels": _digest({"labels": data.labels}),
            "class names": data.class_names,
            "some images, preprocessed": pixels,
        },
        "configuration": {
            **config,
            "parameter groups": [
                {"parameters": len(group["params"])}
                | {key: str(group[key]) for key in group if key not in ("params", "lr")}
                | {"learning rate": rate}
                for group, rate in zip(run.optimizer.param_groups, run.peak_rates, strict=True)
            ],
            "callbacks": [_describe(callback) for callback in callbacks],
        },
    }


def _digest_of_items(items: TrainingItems, keys: list[ItemKey]) -> str:
    inputs = [pixels for pixels, _ in items.__getitems__(keys)]
    return _digest({str(i): pixels for i, pixels in enumerate(inputs)})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def _averaged(weights: Mapping[str, Tensor], fit: FitState) -> dict[str, Tensor]:
    averages = zip(fit.parameters, fit.averages or (), strict=True)
    of = {id(parameter): average for parameter, average in averages}
    return {name: of.get(id(weight), weight) for name, weight in weights.items()}


def _describe(thing: Any) -> str:
    """Name and plain arguments of a loss, a sampler or a callback, whatever has become of it."""
    if isinstance(thing, partial):
        arguments = [*map(str, thing.args), *(f"{k}={v}" for k, v in thing.keywords.items())]
        return f"partial({', '.join([_describe(thing.func), *arguments])})"
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
            yield name, value
        elif isinstance(value, torch.Generator):
            # Not its seed: one that has drawn since then draws something else now.
            yield name, _digest({"state": value.get_state()})
        elif isinstance(value, Sampler):
            yield name, _describe(value)
    if isinstance(thing, nn.Module):
        for name, child in thing.named_children():
            yield name, _describe(child)
