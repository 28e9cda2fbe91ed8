"""When a fit writes checkpoints, what is in them, and how it continues from one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from pairclip import _files
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
from pairclip.finetuner.feeds import Feed
from pairclip.finetuner.step import Trainer
from pairclip.finetuner.targets import write_targets
from pairclip.history import History


@dataclass(eq=False)
class Saver:
    """The checkpoints of one fit."""

    directory: Path
    every: int
    keep: int
    trainer: Trainer
    fit: FitState
    feed: Feed
    callbacks: Sequence[Callback]
    identity: dict[str, Any] = field(init=False, default_factory=dict)
    _lock: ExitStack = field(init=False, default_factory=ExitStack)

    def __enter__(self) -> None:
        """Make the folder, and lock it against other fits.

        Raises:
            OSError: If the folder can't be made, or another fit writes into it.
        """
        if self.trainer.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(
                _files.locked(
                    self.directory,
                    "is the `checkpoint_dir` of another fit that goes on. Wait for its end, or "
                    "choose another folder.",
                )
            )

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def newest(self, *, resume: bool) -> Checkpoint | None:
        """The newest whole checkpoint, on every process.

        Raises:
            ValueError: If there are checkpoints and `resume` is not set.
        """
        if self.trainer.accelerator.is_main_process:
            remove_leftovers(self.directory)
        checkpoint = self._newest()
        if checkpoint is not None and not resume:
            raise ValueError(
                f"`checkpoint_dir` '{self.directory}' has checkpoints up to step "
                f"{checkpoint.step} already. Continue from them with resume=True, or choose "
                "another folder."
            )
        return checkpoint

    def start(
        self, checkpoint: Checkpoint | None, identity: Mapping[str, Any], targets: Tensor | None
    ) -> None:
        """Put everything where the checkpoint left it; or without one, keep the targets.

        Args:
            checkpoint: What `newest` gave.
            identity: What must be the same in the run that it is of.
            targets: Those that follow from the tower as it is now, if there are some.

        Raises:
            ValueError: If the checkpoint is of another run.
        """
        self.identity = dict(identity)
        if checkpoint is None:
            if targets is not None and self.trainer.accelerator.is_main_process:
                write_targets(self.directory, targets)
            return
        state = checkpoint.state()
        different = list(differences(state["identity"], self.identity))
        if different:
            raise ValueError(
                f"Checkpoint '{checkpoint.folder}' is of another run: {'; '.join(different)}. "
                "Use the same model, dataset and settings, or another `checkpoint_dir`."
            )
        weights = state["weights"] if state["weights"] is not None else checkpoint.weights()
        copy_into(trained_tensors(self.trainer.tower), weights)
        self.trainer.load_state_dict(state["run"])
        self.feed.load_state_dict(state.get("feed", {}))
        for callback, its_state in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(its_state)
        self.fit.step = checkpoint.step
        self.fit.history = History(
            state["steps"],
            state["evaluations"],
            state["run"]["skipped_steps"],
            state["stop_reason"],
            self.fit.history.unreadable,
        )

    def _newest(self) -> Checkpoint | None:
        accelerator = self.trainer.accelerator
        newest = newest_checkpoint(self.directory) if accelerator.is_main_process else None
        if accelerator.num_processes == 1:
            return newest
        (step,) = broadcast_object_list([None if newest is None else newest.step])
        if step is None or newest is not None:
            return newest
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
        fit, trainer, history = self.fit, self.trainer, self.fit.history
        if trainer.accelerator.is_main_process:
            newest = history.evaluations[-1] if history.evaluations else {"step": 0}
            fresh = newest["step"] == fit.step
            figure = newest.get("mean_average_precision") if fresh else None
            weights = trained_tensors(trainer.tower)
            state = {
                # The weights are those that were evaluated, so others are kept apart.
                "weights": None if fit.averages is None else weights,
                "identity": self.identity,
                "run": {**trainer.state_dict(), "skipped_steps": history.skipped_steps},
                "feed": self.feed.state_dict(),
                "callbacks": [callback.state_dict() for callback in self.callbacks],
                "steps": history.steps,
                "evaluations": history.evaluations,
                "stop_reason": history.stop_reason,
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
        trainer.accelerator.wait_for_everyone()


def _averaged(weights: Mapping[str, Tensor], fit: FitState) -> dict[str, Tensor]:
    averages = zip(fit.parameters, fit.averages or (), strict=True)
    of = {id(parameter): average for parameter, average in averages}
    return {name: of.get(id(weight), weight) for name, weight in weights.items()}
