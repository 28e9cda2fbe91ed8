"""The training loop: any tower, any loss on embeddings and labels."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pairclip import _checks
from pairclip._batches import BatchSampler, RunBatches, TrainingItems
from pairclip._run import Loss, OptimizerFactory, Run, new_accelerator, training
from pairclip.datasets import LabelledImages
from pairclip.evaluation import evaluate
from pairclip.losses import CosinePairLoss
from pairclip.samplers import ClassBalancedSampler, PairSampler
from pairclip.towers import VisionTower

_LEARNING_RATE = 1e-5
_BATCH_SIZE = 128


@dataclass
class History:
    """What happened during a fit.

    Attributes:
        steps: One record per step: ``step`` (from 1), ``epoch`` (from 0), ``loss``,
            ``learning_rate`` (of the first parameter group) and ``gradient_norm`` (before
            clipping; None where a float16 gradient overflowed).
        evaluations: One record per evaluation: ``step`` and the figures of
            `Evaluation.to_dict`.
        skipped_steps: Steps left out because a float16 gradient overflowed.

    Example:
        >>> from pairclip import History
        >>> history = History(steps=[{"step": 1, "epoch": 0, "loss": 0.5}])
        >>> history.to_dict()["steps"][0]["loss"]
        0.5
    """

    steps: list[dict[str, float | None]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts and numbers."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file; its folder must exist."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> History:
        """Read what `to_json` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


class Finetuner:
    """Fine-tunes a tower so that a loss on its embeddings and their labels goes down.

    Args:
        tower: The tower to train, in place.
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
        seed: Decides the default sampler, dropout and random transforms.

    Raises:
        TypeError: If the tower or the loss is of the wrong kind.
        ValueError: If an argument is out of range, or would be ignored.

    Example:
        >>> import numpy as np
        >>> from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        >>> from pairclip import AllPairsCosineLoss, Finetuner, load_tower
        >>> config = CLIPVisionConfig(
        ...     hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...     image_size=16, patch_size=8, projection_dim=8)
        >>> tower = load_tower(CLIPVisionModelWithProjection(config))
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
        seed: int = 0,
    ) -> None:
        if not isinstance(tower, VisionTower):
            raise TypeError(
                f"`tower` must be a VisionTower, got {type(tower).__name__}. "
                "`pairclip.load_tower` makes one of any module."
            )
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
                "`learning_rate` and `weight_decay` are for the default AdamW and would be "
                "ignored. Set them in the `optimizer` that you give."
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
        self.seed = _checks.check_count("seed", seed)

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
        num_workers: int = 0,
    ) -> History:
        """Train the tower in place, and leave it on the accelerator's device.

        Args:
            dataset: Any labelled dataset that `LabelledImages` takes.
            sampler: A batch sampler over `dataset`; `fit` sets its epoch, from 0. By default a
                `PairSampler` for a `CosinePairLoss`, and for other losses a
                `ClassBalancedSampler`, or a `PairSampler` where the classes don't allow that.
            batch_size: Images per batch, for the default samplers.
            epochs: Epochs of the sampler.
            max_steps: Steps to train, instead of `epochs`.
            eval_dataset: Evaluated during training.
            eval_every: Steps between evaluations; None evaluates after every epoch.
            num_workers: Processes that load and preprocess images beside the training.

        Returns:
            The history.

        Raises:
            ValueError: If an argument is wrong or would be ignored, an image can't be read, or
                the dataset can't form the batches.
            FloatingPointError: If the loss, an embedding or a gradient isn't finite. The tower
                then has the last weights that gave a finite loss.
        """
        _check_length(epochs, max_steps)
        if eval_every is not None:
            _checks.check_positive_int("eval_every", eval_every)
            if eval_dataset is None:
                raise ValueError(
                    f"`eval_every` {eval_every} would be ignored: there is no `eval_dataset`."
                )
        data = LabelledImages(dataset)
        evaluated = None if eval_dataset is None else LabelledImages(eval_dataset)
        sampler = self._sampler(data.labels, sampler, batch_size)
        num_steps = epochs * len(sampler) if max_steps is None else max_steps
        accelerator = new_accelerator(self.precision)
        run = Run(self, accelerator, num_steps)
        history = History()
        loader = DataLoader(
            TrainingItems(data, self.tower.preprocess, seed=self.seed),
            batch_sampler=RunBatches(sampler, num_items=len(data), num_steps=num_steps),
            num_workers=num_workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.seed),
        )
        bar = tqdm(total=num_steps, desc="Fine-tuning", unit="step", disable=None)
        with training(run.modules, accelerator.device), bar:
            torch.manual_seed(self.seed)
            for step, (pixels, labels) in enumerate(loader, start=1):
                record: dict[str, float | None] = {
                    "step": step,
                    "epoch": (step - 1) // len(sampler),
                }
                record |= run.step(pixels, labels, step)
                history.steps.append(record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", rate=f"{record['learning_rate']:.1e}")
                bar.update()
                due = step % (eval_every or len(sampler)) == 0 or step == num_steps
                if evaluated is not None and due:
                    run.check_weights(step)
                    figures = evaluate(self.tower, evaluated).to_dict()
                    history.evaluations.append({"step": step, **figures})
            run.check_weights(num_steps)
        history.skipped_steps = run.skipped_steps
        return history

    def _sampler(
        self, labels: Tensor, sampler: BatchSampler | None, batch_size: int
    ) -> BatchSampler:
        pairs = isinstance(self.loss, CosinePairLoss)
        if sampler is not None:
            if pairs and not isinstance(sampler, PairSampler):
                raise ValueError(
                    f"A `CosinePairLoss` takes the pairs of a `PairSampler`, got "
                    f"{type(sampler).__name__}. Use `AllPairsCosineLoss` for other batches."
                )
            if not isinstance(sampler, BatchSampler):
                raise TypeError(f"`sampler` must have `__iter__` and `__len__`, got {sampler!r}.")
            if not len(sampler):
                raise ValueError(
                    "`sampler` has no batch, its len() is 0. Are its batches larger than the "
                    "dataset, with drop_last=True?"
                )
            if batch_size != _BATCH_SIZE:
                raise ValueError(f"`batch_size` {batch_size} would be ignored: `sampler` decides.")
            return sampler
        _checks.check_positive_int("batch_size", batch_size)
        if pairs:
            return _pair_sampler(labels, batch_size, self.seed)
        balanced = _balanced_sampler(labels, batch_size, self.seed)
        if balanced is not None:
            return balanced
        fallback = _pair_sampler(labels, batch_size, self.seed)
        warnings.warn(
            f"Batches of {batch_size} images can't hold equally many of several classes without "
            "leaving classes out, so they are made of pairs. Choose a `batch_size` that P classes "
            "times K images make up, with K at most the images of the smallest class, to avoid it.",
            stacklevel=3,
        )
        return fallback


def _check_length(epochs: int, max_steps: int | None) -> None:
    _checks.check_positive_int("epochs", epochs)
    if max_steps is None:
        return
    _checks.check_positive_int("max_steps", max_steps)
    if epochs != 1:
        raise ValueError(f"`epochs` {epochs} would be ignored: `max_steps` is {max_steps}.")


def _pair_sampler(labels: Tensor, batch_size: int, seed: int) -> PairSampler:
    if batch_size % 2:
        raise ValueError(f"`batch_size` must be even for pairs, got {batch_size}.")
    if batch_size > 2 * len(labels):
        raise ValueError(
            f"`batch_size` must be at most two per image, got {batch_size} for {len(labels)} "
            "images. Lower it."
        )
    return PairSampler(labels, batch_size // 2, seed=seed)


def _balanced_sampler(labels: Tensor, batch_size: int, seed: int) -> ClassBalancedSampler | None:
    """P classes times K images that make up the batch: K from 4 on, else 3 or 2.

    None where such batches would leave out a class that has two images.
    """
    counts = labels.unique(return_counts=True)[1]
    counts = counts[counts > 1]
    for samples in [*range(4, batch_size // 2 + 1), 3, 2]:
        classes = batch_size // samples
        divides = classes * samples == batch_size
        if divides and 2 <= classes <= len(counts) and bool((counts >= samples).all()):
            return ClassBalancedSampler(labels, classes, samples, seed=seed)
    return None
