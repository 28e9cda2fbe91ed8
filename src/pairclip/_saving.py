"""When a fit writes checkpoints, what is in them, and how it continues from one."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from pairclip._batches import BatchSampler, ItemKey, TrainingItems
from pairclip._run import Run
from pairclip.callbacks import Callback, FitState
from pairclip.checkpoints import (
    Checkpoint,
    copy_into,
    differences,
    newest_checkpoint,
    trained_tensors,
    write_checkpoint,
)
from pairclip.towers.base import bytes_of

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
        """
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
        copy_into(trained_tensors(self.run.tower), checkpoint.weights())
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
            state = {
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
                    weights=trained_tensors(run.tower),
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
        "optimizer": _describe(run.optimizer.optimizer),
        "learning_rate": run.peak_rates[0],
        "learning_rates": str(run.peak_rates),
        "warmup_ratio": settings.warmup_ratio,
        "schedule": settings.schedule,
        "precision": run.accelerator.mixed_precision,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
    }


def identity_of(
    run: Run, items: TrainingItems, config: Mapping[str, Any], callbacks: Sequence[Callback]
) -> dict[str, Any]:
    """What must be the same in a run that continues from a checkpoint, and a word for each."""
    tower, data = run.tower, items.data
    frozen = {name: p for name, p in tower.named_parameters() if not p.requires_grad}
    chosen = torch.linspace(0, len(data) - 1, _SAMPLED_ITEMS).long().tolist()
    inputs = items.__getitems__([ItemKey(0, i, item) for i, item in enumerate(chosen)])
    return {
        "model": {
            "class": type(getattr(tower, "model", tower)).__qualname__,
            "trained weights": _digest(
                {name: torch.tensor(t.shape) for name, t in trained_tensors(tower).items()}
            ),
            "frozen weights": _digest(frozen),
        },
        "dataset": {
            "images": len(data),
            "labels": _digest({"labels": data.labels}),
            "class names": data.class_names,
            "some images, preprocessed": _digest({str(i): x for i, (x, _) in enumerate(inputs)}),
        },
        "configuration": {
            **config,
            "callbacks": [type(callback).__qualname__ for callback in callbacks],
        },
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def _describe(thing: Callable[..., Any] | nn.Module | BatchSampler | None) -> str:
    """Class and plain settings of a loss, a sampler or an optimizer, in words that don't change."""
    if isinstance(thing, torch.optim.Optimizer):
        settings: dict[str, Any] = dict(thing.defaults)
        name = type(thing).__qualname__
    else:
        name = getattr(thing, "__qualname__", type(thing).__qualname__)
        settings = dict(_settings(thing))
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _settings(thing: Any) -> Iterator[tuple[str, Any]]:
    for name, value in getattr(thing, "__dict__", {}).items():
        # What changes as a sampler or module is used.
        changing = name in ("training", "epoch", "batch") or name.startswith("_")
        if isinstance(value, (bool, int, float, str, type(None))) and not changing:
            yield name, value
    if isinstance(thing, nn.Module):
        for name, child in thing.named_children():
            yield name, _describe(child)
