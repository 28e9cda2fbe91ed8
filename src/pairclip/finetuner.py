"""The training loop: any tower, any loss on embeddings and labels."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from pairclip import _checks, _files
from pairclip._batches import (
    BatchSampler,
    RunBatches,
    TrainingItems,
    check_sampler,
)
from pairclip._exact_step import Loss
from pairclip._interrupts import StopSignals, leave_stopping_to_main
from pairclip._loop import Loop
from pairclip._run import (
    OptimizerFactory,
    Run,
    accelerate_state_kept,
    check_accelerator,
    new_accelerator,
)
from pairclip._saving import Saver, config_of, identity_of
from pairclip.callbacks import Callback, FitState
from pairclip.datasets import LabelledImages
from pairclip.losses import CosinePairLoss
from pairclip.samplers import default_sampler
from pairclip.towers import VisionTower
from pairclip.towers.base import tower_of

_LEARNING_RATE = 1e-5
_BATCH_SIZE = 128
_KEEP = 2


@dataclass
class History:
    """What happened during a fit.

    Attributes:
        steps: One record per step: ``step`` (from 1), ``epoch`` (from 0), ``loss``,
            ``learning_rate`` (of the first parameter group) and ``gradient_norm`` (before
            clipping; None where a float16 gradient overflowed).
        evaluations: One record per evaluation: ``step`` and the single figures of
            `Evaluation.to_dict`.
        skipped_steps: Steps left out because a float16 gradient overflowed.
        stop_reason: Why a callback ended the fit early, or None.

    Example:
        >>> from pairclip import History
        >>> history = History(steps=[{"step": 1, "epoch": 0, "loss": 0.5}])
        >>> history.to_dict()["steps"][0]["loss"]
        0.5
    """

    steps: list[dict[str, float | None]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: int = 0
    stop_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts and numbers."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file, whole or not at all; its folder must exist."""
        _files.write_json(path, self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> History:
        """Read what `to_json` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


class Finetuner:
    """Fine-tunes a tower so that a loss on its embeddings and their labels goes down.

    The gradient of a step is that of the loss of the whole batch, however many processes and
    micro-batches share the work: each image is encoded once, the loss sees all embeddings.

    Args:
        tower: The tower to train, in place: a `VisionTower`, the head of one that was split, or
            one that `peft.get_peft_model` wrapped.
        loss: ``loss(embeddings [B, D] float32, labels [B] int64)`` giving a scalar: one of
            pairclip's, of pytorch-metric-learning's, or your own. A `CosinePairLoss` takes the
            pairs of a `PairSampler`. A loss's own parameters are trained too.
        learning_rate: Peak rate of AdamW.
        weight_decay: Decay of AdamW, on weight matrices only, not on biases or norms.
        warmup_ratio: Share of the steps in which the rate rises linearly, in ``[0, 1)``.
        schedule: ``"cosine"``, ``"linear"`` (both fall to 0) or ``"constant"``, after warm-up.
        optimizer: None for AdamW, or a callable that takes the list of trainable parameters and
            returns an optimizer; it then sets rate and decay itself.
        precision: ``"auto"`` (bfloat16 where a GPU has it), ``"no"``, ``"bf16"`` or ``"fp16"``.
            The loss is always computed in float32.
        max_grad_norm: Gradients are scaled down to this norm; None clips nothing.
        micro_batch_size: Images whose activations are in memory at once, on each process; None
            for the whole of its share. Each image is then encoded twice.
        accelerator: An `accelerate.Accelerator` of yours; None makes one. Under ``accelerate
            launch`` each batch is divided among the processes.
        callbacks: Objects with the methods of `Callback`, called in this order.
        seed: Decides the default sampler, dropout and random transforms.

    Raises:
        TypeError: If the tower or the loss is of the wrong kind.
        ValueError: If an argument is out of range, or would be ignored.

    Example:
        >>> import numpy as np
        >>> from pairclip import AllPairsCosineLoss, Finetuner
        >>> from pairclip.towers import random_tower
        >>> tower = random_tower()
        >>> images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        >>> labels = [0, 0, 0, 0, 1, 1, 1, 1]
        >>> finetuner = Finetuner(tower, AllPairsCosineLoss(negatives="squared"))
        >>> history = finetuner.fit((images, labels), batch_size=4, epochs=3)
        >>> len(history.steps)
        6
    """

    def __init__(
        self,
        tower: VisionTower,
        loss: Loss | CosinePairLoss,
        *,
        learning_rate: float = _LEARNING_RATE,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.1,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        optimizer: OptimizerFactory | None = None,
        precision: Literal["auto", "no", "bf16", "fp16"] = "auto",
        max_grad_norm: float | None = 1.0,
        micro_batch_size: int | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Iterable[Callback] = (),
        seed: int = 0,
    ) -> None:
        tower_of(tower)
        if not callable(loss) or isinstance(loss, type):
            raise TypeError(f"`loss` must be a callable, such as an instance, got {loss!r}.")
        for name, value in [
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("warmup_ratio", warmup_ratio),
            ("max_grad_norm", 1.0 if max_grad_norm is None else max_grad_norm),
        ]:
            _checks.check_number(name, value)
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"`learning_rate` must be positive and finite, got {learning_rate}.")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"`weight_decay` must be at least 0, got {weight_decay}.")
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"`warmup_ratio` must be in [0, 1), got {warmup_ratio}.")
        _checks.check_choice("schedule", schedule, ("cosine", "linear", "constant"))
        _checks.check_choice("precision", precision, ("auto", "no", "bf16", "fp16"))
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"`max_grad_norm` must be positive, got {max_grad_norm}. None clips nothing."
            )
        if optimizer is not None and not callable(optimizer):
            raise TypeError(
                "`optimizer` must be a callable that takes the parameters, for instance "
                f"`lambda parameters: torch.optim.SGD(parameters, lr=0.1)`, got {optimizer!r}."
            )
        if optimizer is not None and (learning_rate != _LEARNING_RATE or weight_decay):
            raise ValueError(
                f"`learning_rate` {learning_rate} and `weight_decay` {weight_decay} are for the "
                "default AdamW and would be ignored. Set them in the `optimizer` that you give."
            )
        if micro_batch_size is not None:
            _checks.check_positive_int("micro_batch_size", micro_batch_size)
        if accelerator is not None:
            check_accelerator(accelerator)
            if precision != "auto":
                raise ValueError(
                    f"`precision` {precision!r} would be ignored: `accelerator` decides, and has "
                    f"{accelerator.mixed_precision!r}."
                )
        if isinstance(callbacks, Callback):
            raise TypeError(f"`callbacks` must be a list, got {callbacks!r}. Put it into one.")
        callbacks = list(callbacks)
        for callback in callbacks:
            if not isinstance(callback, Callback) or isinstance(callback, type):
                raise TypeError(
                    f"`callbacks` must have the methods of `pairclip.Callback`, got {callback!r}. "
                    "Inherit from it to have them."
                )
        self.tower = tower
        self.loss = loss
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.schedule = schedule
        self.optimizer = optimizer
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.micro_batch_size = micro_batch_size
        self.accelerator = accelerator
        self.callbacks = callbacks
        self.seed = _checks.check_count("seed", seed)

    @accelerate_state_kept()
    def fit(
        self,
        dataset: Any,
        *,
        sampler: BatchSampler | None = None,
        batch_size: int = _BATCH_SIZE,
        epochs: int = 1,
        max_steps: int | None = None,
        eval_dataset: Any = None,
        eval_every: int | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep_checkpoints: int = _KEEP,
        resume: bool = False,
        num_workers: int = 0,
    ) -> History:
        """Train the tower in place, and leave it on the accelerator's device.

        Args:
            dataset: Any labelled dataset that `LabelledImages` takes, or cached features.
            sampler: A batch sampler over `dataset`; `fit` sets its epoch, from 0. By default a
                `PairSampler` for a `CosinePairLoss`, and for other losses a
                `ClassBalancedSampler`, or a `PairSampler` where the classes don't allow that.
            batch_size: Images per batch, over all processes, for the default samplers.
            epochs: Epochs of the sampler.
            max_steps: Steps to train, instead of `epochs`.
            eval_dataset: Evaluated during training.
            eval_every: Steps between evaluations; None evaluates after every epoch.
            checkpoint_dir: Folder for checkpoints. With it, Ctrl-C and SIGTERM end the step,
                write a checkpoint and then stop the program; a second Ctrl-C stops at once.
            checkpoint_every: Steps between checkpoints; None writes one after every epoch.
            keep_checkpoints: How many of the last checkpoints stay, beside the one with the best
                mean average precision.
            resume: Continue from the newest whole checkpoint in `checkpoint_dir`; without one,
                start. On the CPU the weights end bit for bit as without the interruption.
            num_workers: Processes that load and preprocess images beside the training; in an
                evaluation as many.

        Returns:
            The history, of the earlier parts of a resumed run too.

        Raises:
            ValueError: If an argument is wrong or would be ignored, an image can't be read, the
                dataset can't form the batches, the checkpoint is of another model, dataset or
                configuration, or there are checkpoints already and `resume` is not set.
            FloatingPointError: If the loss, an embedding, a gradient or a weight isn't finite.
                The first three are seen before they change a weight: the tower then has those
                from before the step.

        Warns:
            UserWarning: If a checkpoint could not be written, or is damaged and passed over; or
                resuming will not be exact, because a transform draws from its own generator.
        """
        _check_length(epochs, max_steps)
        _check_every("eval", eval_every, "dataset", eval_dataset)
        _check_every("checkpoint", checkpoint_every, "dir", checkpoint_dir)
        _checks.check_positive_int("keep_checkpoints", keep_checkpoints)
        _checks.check_count("num_workers", num_workers)
        if keep_checkpoints != _KEEP and checkpoint_dir is None:
            raise ValueError(
                f"`keep_checkpoints` {keep_checkpoints} would be ignored: there is no "
                "`checkpoint_dir`."
            )
        if resume and checkpoint_dir is None:
            raise ValueError("`resume` needs a `checkpoint_dir` to resume from.")
        data = LabelledImages(dataset)
        evaluated = None if eval_dataset is None else LabelledImages(eval_dataset)
        pairs = isinstance(self.loss, CosinePairLoss)
        if sampler is None:
            sampler = default_sampler(data.labels, batch_size, self.seed, pairs=pairs)
        else:
            check_sampler(sampler, pairs=pairs)
            if batch_size != _BATCH_SIZE:
                raise ValueError(f"`batch_size` {batch_size} would be ignored: `sampler` decides.")
        num_steps = epochs * len(sampler) if max_steps is None else max_steps
        accelerator = self.accelerator or new_accelerator(self.precision)
        check_accelerator(accelerator)
        run = Run(self, accelerator, num_steps)
        items = TrainingItems(data, tower_of(self.tower).preprocess, seed=self.seed)
        history = History()
        fit = FitState(
            tower=run.tower,
            parameters=run.parameters,
            accelerator=accelerator,
            num_steps=num_steps,
            evaluates=evaluated is not None,
            config=config_of(run, sampler),
            steps=history.steps,
            evaluations=history.evaluations,
        )
        saver = None
        if checkpoint_dir is not None:
            saver = Saver(
                Path(checkpoint_dir),
                every=checkpoint_every or len(sampler),
                keep=keep_checkpoints,
                run=run,
                fit=fit,
                callbacks=self.callbacks,
                identity=identity_of(run, items, fit.config, self.callbacks),
            )
            saver.resume(wanted=resume)
        signals = StopSignals(active=saver is not None)
        leave = partial(leave_stopping_to_main, left=signals.left)
        workers: dict[str, Any] = {
            "num_workers": num_workers,
            "worker_init_fn": None if saver is None else leave,
        }
        loader = DataLoader(
            items,
            batch_sampler=RunBatches(
                sampler,
                num_items=len(data),
                steps=range(fit.step, num_steps),
                seed=self.seed,
                process=accelerator.process_index,
                num_processes=accelerator.num_processes,
            ),
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.seed),
            **workers,
        )
        loop = Loop(
            run,
            fit,
            self.callbacks,
            steps_per_epoch=len(sampler),
            evaluated=evaluated,
            eval_every=eval_every or len(sampler),
            workers=workers,
            saver=saver,
            signals=signals,
        )
        with run.training(), signals:
            ended = loop.train(loader)
        history.skipped_steps, history.stop_reason = run.skipped_steps, fit.stop_reason
        if not ended or signals.caught is not None:
            signals.obey()
        return history


def _check_length(epochs: int, max_steps: int | None) -> None:
    _checks.check_positive_int("epochs", epochs)
    if max_steps is None:
        return
    _checks.check_positive_int("max_steps", max_steps)
    if epochs != 1:
        raise ValueError(f"`epochs` {epochs} would be ignored: `max_steps` is {max_steps}.")


def _check_every(what: str, every: int | None, needed: str, given: object) -> None:
    if every is None:
        return
    _checks.check_positive_int(f"{what}_every", every)
    if given is None:
        raise ValueError(f"`{what}_every` {every} would be ignored: there is no `{what}_{needed}`.")
