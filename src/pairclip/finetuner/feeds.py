"""What a fit trains on: a dataset with a length, or a stream; and how its batches are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pairclip.datasets import LabelledImages, Problem, StreamBatches
from pairclip.datasets.stream_items import StreamPlace
from pairclip.finetuner.agreement import BatchDigests
from pairclip.finetuner.batches import (
    BATCH_SIZE,
    KEEP_SHARE,
    BatchSampler,
    RunBatches,
    TrainingItems,
    choose_batches,
    loader_of,
)
from pairclip.finetuner.images import FitImages
from pairclip.finetuner.settings import Plan
from pairclip.finetuner.targets import check_targets
from pairclip.samplers import ClassBalancedSampler, GroupSampler, PairSampler

Loaded = tuple[Tensor, Tensor, Tensor | None]  # pixel values, labels, and places of the targets


class DatasetFeed:
    """Batches of a dataset, as a sampler draws them.

    Args:
        loss: Of the fit.
        dataset: As `Finetuner.fit` takes it, and the arguments after it.
        preprocess: Of the tower.
        seed: Of the fit.

    Attributes:
        images: All images of the fit.
        targets: A row for each of them, if the loss was given some.
        sampler: Draws the labelled part of each batch.
        steps_per_epoch: Its batches.
        unreadable: Images that are left out on the way: none, as all are known at the start.
    """

    unreadable: Sequence[Problem] = ()

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dataset: Any,
        preprocess: Callable[[Any], Tensor],
        *,
        sampler: BatchSampler | None,
        batch_size: int,
        targets: Any,
        keep: Any,
        keep_share: float,
        seed: int,
    ) -> None:
        self.images = FitImages(LabelledImages(dataset), keep)
        self.targets = check_targets(loss, targets, self.images)
        self.sampler, self.kept = choose_batches(
            loss, self.images, sampler, batch_size=batch_size, keep_share=keep_share, seed=seed
        )
        self.items = TrainingItems(self.images, preprocess, seed=seed)
        self.steps_per_epoch = len(self.sampler)

    @property
    def named_images(self) -> dict[str, LabelledImages | None]:
        """What can be looked at before the first step, by the argument that it is of."""
        return {"dataset": self.images.data, "keep": self.images.keep}

    def epoch_of(self, step: int) -> int:
        """Which epoch a step is in, both from 0."""
        return step // self.steps_per_epoch

    def load(
        self,
        steps: range,
        accelerator: Accelerator,
        digests: BatchDigests | None,
        workers: Mapping[str, Any],
    ) -> Iterable[Loaded]:
        """This process's slices of these steps' batches, each of which `digests` is told of."""
        batches = RunBatches(
            self.sampler,
            num_items=len(self.images.data),
            steps=steps,
            seed=self.items.seed,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            kept=self.kept,
            digests=digests,
        )
        return loader_of(self.items, batches, accelerator.device, workers)

    def drawn(self, num_steps: int) -> Tensor | None:
        """Images that the first steps draw, int64 ascending; None where it may be any."""
        known = type(self.sampler) in (PairSampler, ClassBalancedSampler, GroupSampler)
        if not known or num_steps >= self.steps_per_epoch:
            return None
        batches = RunBatches(
            self.sampler,
            num_items=len(self.images.data),
            steps=range(num_steps),
            seed=self.items.seed,
            kept=self.kept,
        )
        return torch.tensor(sorted({key.item for batch in batches for key in batch}), device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""


class StreamFeed:
    """Batches of a stream, whose epochs have a length that nobody knows.

    Raises:
        ValueError: If an argument would be ignored, or one is missing that a length would tell.
    """

    images = None
    targets = None
    kept = None
    steps_per_epoch = None
    named_images: Mapping[str, LabelledImages | None] = {}

    def __init__(
        self,
        loss: Callable[..., Tensor],
        stream: StreamBatches,
        plan: Plan,
        *,
        sampler: Any,
        batch_size: int,
        targets: Any,
        keep: Any,
        keep_share: float,
    ) -> None:
        for name, given in (
            ("sampler", sampler is not None),
            ("batch_size", batch_size != BATCH_SIZE),
            ("targets", targets is not None),
            ("keep", keep is not None),
            ("keep_share", keep_share != KEEP_SHARE),
            ("check", plan.check is not None),
        ):
            if given:
                raise ValueError(
                    f"`{name}` would be ignored: `dataset` is a stream, which makes its batches "
                    "itself, and whose images have no places."
                )
        for flag, what in (("takes_pairs", "pairs"), ("takes_targets", "targets")):
            if getattr(loss, flag, False):
                raise ValueError(
                    f"`loss` {type(loss).__name__} takes {what}, and a stream gives batches of "
                    "images and labels. Train with a loss on these, such as `AllPairsCosineLoss`."
                )
        if plan.max_steps is None:
            raise ValueError(
                "`max_steps` is needed: `dataset` is a stream, whose epoch, one pass over it, has "
                "no known length."
            )
        for name, every, needed in (
            ("eval_every", plan.eval_every, plan.evaluates),
            ("checkpoint_every", plan.checkpoint_every, plan.checkpoint_dir is not None),
        ):
            if needed and every is None:
                raise ValueError(
                    f"`{name}` is needed: `dataset` is a stream, whose epoch has no known length."
                )
        self.sampler = self.items = stream
        self._place = StreamPlace(0, 0, 0)
        self._unreadable: dict[Problem, None] = {}

    def epoch_of(self, step: int) -> int:
        """Which epoch the last batch was drawn in."""
        return self._place.epoch

    def load(
        self,
        steps: range,
        accelerator: Accelerator,
        digests: BatchDigests | None,
        workers: Mapping[str, Any],
    ) -> Iterator[Loaded]:
        """This process's slices of these steps' batches, each of which `digests` is told of."""
        size = self.sampler.classes_per_batch * self.sampler.samples_per_class
        process, processes = accelerator.process_index, accelerator.num_processes
        if size % processes:
            raise ValueError(
                f"A batch of {size} images can't be divided among {processes} processes. Choose "
                "`classes_per_batch` times `samples_per_class` as a multiple of their number."
            )
        share = slice(process * size // processes, (process + 1) * size // processes)
        pinned = accelerator.device.type == "cuda"
        for pixels, labels, place, unreadable in self.sampler.run(
            self._place, len(steps), share, pin_memory=pinned, **workers
        ):
            self._place = place
            self._unreadable |= dict.fromkeys(unreadable)
            if digests is not None:
                digests.add((place.epoch, place.batch, place.digest or 0))
            yield pixels, labels, None

    @property
    def unreadable(self) -> list[Problem]:
        """Images that were left out on the way to the last batch."""
        return list(self._unreadable)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and what was left out until then."""
        return {**self._place._asdict(), "unreadable": [vars(each) for each in self._unreadable]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        place = dict(state)
        # The first checkpoints of streams had none.
        self._unreadable = {Problem(**each): None for each in place.pop("unreadable", ())}
        self._place = StreamPlace(**place)


Feed = DatasetFeed | StreamFeed
