"""`Finetuner`: its arguments, and the parts of a fit put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from pairclip.callbacks import Callback, FitState
from pairclip.callbacks.base import check_callbacks
from pairclip.datasets import LabelledImages, StreamBatches
from pairclip.embedding import lost_processes_named
from pairclip.finetuner.accelerators import (
    accelerate_state_kept,
    check_accelerator,
    new_accelerator,
)
from pairclip.finetuner.agreement import (
    BatchDigests,
    check_same,
    one_fit_at_a_time,
)
from pairclip.finetuner.batches import BATCH_SIZE, KEEP_SHARE, BatchSampler
from pairclip.finetuner.evaluations import (
    check_all_images,
    choose_evaluation,
    left_out_of,
)
from pairclip.finetuner.feeds import DatasetFeed, Feed, StreamFeed
from pairclip.finetuner.identity import (
    config_of,
    identity_of,
    parameter_groups,
    statement_of,
)
from pairclip.finetuner.loop import Loop
from pairclip.finetuner.resuming import Saver
from pairclip.finetuner.settings import (
    KEEP_CHECKPOINTS,
    LEARNING_RATE,
    OptimizerFactory,
    Plan,
    Precision,
    Schedule,
    Settings,
)
from pairclip.finetuner.step import Trainer
from pairclip.finetuner.stop_signals import StopSignals, leave_stopping_to_main
from pairclip.finetuner.targets import untouched_embeddings
from pairclip.history import History
from pairclip.towers import VisionTower, tower_of


class Finetuner:
    """Fine-tunes a tower so that a loss on its embeddings and their labels goes down.

    The gradient of a step is that of the loss of the whole batch, however many processes and
    micro-batches share the work: each image is encoded once, the loss sees all embeddings.

    Args:
        tower: The tower to train, in place: a `VisionTower`, the head of one that was split, or
            one that `peft.get_peft_model` wrapped.
        loss: ``loss(embeddings [B, D] float32, labels [B] int64)`` giving a scalar: one of
            pairclip's, of pytorch-metric-learning's, or your own. One with an attribute
            ``takes_pairs = True``, as `CosinePairLoss` has, is called as ``loss(a, b, same)``
            with the pairs of a `PairSampler`; one with ``takes_targets = True`` as
            ``loss(embeddings, labels, targets)``. A loss's own parameters are trained too.
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
        loss: Callable[..., Tensor],
        *,
        learning_rate: float = LEARNING_RATE,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.1,
        schedule: Schedule = "cosine",
        optimizer: OptimizerFactory | None = None,
        precision: Precision = "auto",
        max_grad_norm: float | None = 1.0,
        micro_batch_size: int | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Iterable[Callback] = (),
        seed: int = 0,
    ) -> None:
        tower_of(tower)
        if not callable(loss) or isinstance(loss, type):
            raise TypeError(f"`loss` must be a callable, such as an instance, got {loss!r}.")
        self.settings = Settings(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            schedule=schedule,
            optimizer=optimizer,
            precision=precision,
            max_grad_norm=max_grad_norm,
            micro_batch_size=micro_batch_size,
            seed=seed,
        )
        if accelerator is not None:
            check_accelerator(accelerator)
            if precision != "auto":
                raise ValueError(
                    f"`precision` {precision!r} would be ignored: `accelerator` decides, and has "
                    f"{accelerator.mixed_precision!r}."
                )
        self.tower = tower
        self.loss = loss
        self.accelerator = accelerator
        self.callbacks = check_callbacks(callbacks)

    learning_rate = property(attrgetter("settings.learning_rate"))
    weight_decay = property(attrgetter("settings.weight_decay"))
    warmup_ratio = property(attrgetter("settings.warmup_ratio"))
    schedule = property(attrgetter("settings.schedule"))
    optimizer = property(attrgetter("settings.optimizer"))
    precision = property(attrgetter("settings.precision"))
    max_grad_norm = property(attrgetter("settings.max_grad_norm"))
    micro_batch_size = property(attrgetter("settings.micro_batch_size"))
    seed = property(attrgetter("settings.seed"))

    @one_fit_at_a_time()
    @lost_processes_named()
    @accelerate_state_kept()
    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(
        self,
        dataset: Any,
        *,
        sampler: BatchSampler | None = None,
        batch_size: int = BATCH_SIZE,
        epochs: int = 1,
        max_steps: int | None = None,
        targets: Any = None,
        keep: Any = None,
        keep_share: float = KEEP_SHARE,
        eval_dataset: Any = None,
        evaluate: Callable[[VisionTower], Mapping[str, Any]] | None = None,
        eval_every: int | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep_checkpoints: int = KEEP_CHECKPOINTS,
        resume: bool = False,
        num_workers: int = 0,
        check: Literal["paths", "decode"] | None = None,
    ) -> History:
        """Train the tower in place, and leave it on the accelerator's device.

        Args:
            dataset: Any labelled dataset that `LabelledImages` takes, or cached features. Or a
                stream as `pairclip.datasets.StreamBatches`, whose epoch is one pass; it needs
                `max_steps`, and `eval_every` and `checkpoint_every` where something is evaluated
                or saved.
            sampler: A batch sampler over `dataset`; `fit` sets its epoch, from 0. By default a
                `PairSampler` for a loss that takes pairs, and for other losses a
                `ClassBalancedSampler`, or a `PairSampler` where the classes don't allow that.
            batch_size: Images per batch, over all processes, for the default samplers.
            epochs: Epochs of the sampler.
            max_steps: Steps to train, instead of `epochs`.
            targets: For a loss that takes targets: a row for each image of `dataset`, floating
                point ``[N, K]``, which the loss gets with the image's embedding. None is for
                losses that preserve, such as `PreservingLoss`: their targets are the embeddings
                of the images by the tower as it is before the first step.
            keep: Images that are to stay where they are, with or without labels, which are not
                looked at: the loss gets them with the label -1. For a loss that takes targets;
                rows in `targets` for them come after those of `dataset`. An epoch is that of the
                sampler; to each of its batches images are added, dealt from a shuffled deck.
            keep_share: Share of `keep` in each batch, in ``(0, 1)``; `batch_size` counts them, a
                `sampler` does not.
            eval_dataset: Evaluated during training.
            evaluate: Evaluates instead of `pairclip.evaluate` on an `eval_dataset`: takes the
                tower and returns numbers by name, of which the checkpoints and `EarlyStopping`
                look at ``"mean_average_precision"``. With several processes, each calls it, and
                the numbers of the first count.
            eval_every: Steps between evaluations; None evaluates after every epoch.
            checkpoint_dir: Folder for checkpoints, which the file ``.lock`` in it keeps other fits
                out of. With it, Ctrl-C and SIGTERM end the step, write a checkpoint and then stop
                the program; a second Ctrl-C stops at once.
            checkpoint_every: Steps between checkpoints; None writes one after every epoch.
            keep_checkpoints: How many of the last checkpoints stay, beside the one with the best
                mean average precision.
            resume: Continue from the newest whole checkpoint in `checkpoint_dir`; without one,
                start. On the CPU the weights end bit for bit as without the interruption.
            num_workers: Processes that load and preprocess images beside the training; in an
                evaluation as many.
            check: ``"paths"`` looks before the first step whether all files are there, and
                ``"decode"`` reads every image; None looks at a few of `eval_dataset`.

        Returns:
            The history, of the earlier parts of a resumed run too.

        Raises:
            ValueError: If an argument is wrong or would be ignored, an image can't be read, the
                dataset can't form the batches, the checkpoint is of another model, dataset or
                configuration, or there are checkpoints already and `resume` is not set.
            FloatingPointError: If the loss, an embedding, a gradient or a weight isn't finite.
                The first three are seen before they change a weight: the tower then has those
                from before the step.
            OSError: If `checkpoint_dir` can't be made, or another fit writes into it.
            RuntimeError: If another process of the fit failed, or another thread is in a fit.

        Warns:
            UserWarning: If a checkpoint could not be written, or is damaged and passed over; or
                resuming will not be exact, because a transform draws from its own generator.
        """
        plan = Plan(
            epochs=epochs,
            max_steps=max_steps,
            evaluates=evaluate is not None or eval_dataset is not None,
            eval_every=eval_every,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir).absolute(),
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            resume=resume,
            num_workers=num_workers,
            check=check,
        )
        signals = StopSignals(active=plan.checkpoint_dir is not None)
        leave = partial(leave_stopping_to_main, left=signals.left)
        workers: dict[str, Any] = {"num_workers": num_workers}
        workers["worker_init_fn"] = None if plan.checkpoint_dir is None else leave
        evaluated = None if eval_dataset is None else LabelledImages(eval_dataset)
        evaluation = choose_evaluation(evaluate, evaluated, workers)
        chosen: dict[str, Any] = {"sampler": sampler, "batch_size": batch_size}
        chosen |= {"targets": targets, "keep": keep, "keep_share": keep_share}
        feed: Feed
        if isinstance(dataset, StreamBatches):
            feed = StreamFeed(self.loss, dataset, plan, **chosen)
        else:
            preprocess = tower_of(self.tower).preprocess
            feed = DatasetFeed(self.loss, dataset, preprocess, seed=self.seed, **chosen)
        named = {**feed.named_images, "eval_dataset": evaluated}
        check_all_images(named, check, num_workers)
        accelerator = self.accelerator or new_accelerator(self.settings.precision)
        check_accelerator(accelerator)
        digests = None
        if accelerator.num_processes > 1:
            digests = BatchDigests()
            statement = statement_of(self.tower, self.loss, self.settings, plan, feed, evaluated)
            check_same(accelerator, statement)
        per_epoch = feed.steps_per_epoch or 0
        num_steps = epochs * per_epoch if max_steps is None else max_steps
        trainer = Trainer(self.tower, self.loss, self.settings, accelerator, num_steps)
        fit = FitState(
            tower=trainer.tower,
            parameters=trainer.parameters,
            accelerator=accelerator,
            num_steps=num_steps,
            evaluates=plan.evaluates,
            config=config_of(trainer, feed),
            history=History(unreadable=left_out_of(named)),
        )
        check_same(accelerator, {**fit.config, "parameter groups": parameter_groups(trainer)})
        saver = None
        if plan.checkpoint_dir is not None:
            every = checkpoint_every or per_epoch
            saver = Saver(
                plan.checkpoint_dir, every, keep_checkpoints, trainer, fit, feed, self.callbacks
            )
        with saver or nullcontext():
            checkpoint = None if saver is None else saver.newest(resume=resume)
            rows = feed.targets
            if rows is None and feed.images is not None and getattr(self.loss, "preserves", False):
                folder = None if checkpoint is None else plan.checkpoint_dir
                rows = untouched_embeddings(
                    self.tower, feed.images, feed.drawn(num_steps), self.seed, workers, folder
                )
            if saver is not None:
                identity = identity_of(trainer, feed.items, rows, fit.config, self.callbacks)
                saver.start(checkpoint, identity, None if targets is not None else rows)
            loop = Loop(
                trainer,
                fit,
                self.callbacks,
                epoch_of=feed.epoch_of,
                targets=rows,
                digests=digests,
                evaluate=evaluation,
                eval_every=eval_every or per_epoch,
                saver=saver,
                signals=signals,
            )
            with trainer.training(), signals:
                steps = range(fit.step, num_steps)
                ended = loop.train(feed.load(steps, accelerator, digests, workers))
        fit.history.unreadable += left_out_of({"dataset": feed})
        if not ended or signals.caught is not None:
            signals.obey()
        return fit.history
