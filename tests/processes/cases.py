"""What every one of several processes does; `test_processes.py` looks at what they return."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from PIL import Image
from processes import small
from torch import Tensor, distributed, nn
from torch.futures import Future
from torch.utils.data import BatchSampler, RandomSampler

from pairclip import (
    Callback,
    CollapseMonitor,
    Finetuner,
    ImageIndex,
    PreservingLoss,
    TargetSimilarityLoss,
    WeightAverage,
    embed_images,
)
from pairclip.datasets import StreamBatches
from pairclip.features import cache_features
from pairclip.finetuner import accelerators
from pairclip.towers import random_tower


def gradients(micro: list[int | None], steps_with: int | None) -> dict[str, Any]:
    """First gradients with each size of a micro-batch, and some steps of plain SGD with one."""
    found: dict[str, Any] = {}
    for name in small.LOSSES:
        for size in micro:
            first, _, _ = small.fit(
                small.new_tower(),
                small.new_loss(name),
                small.new_sampler(name),
                micro_batch_size=size,
            )
            found[f"{name}, {size}"] = first
        found[name] = small.fit(
            small.new_tower(),
            small.new_loss(name),
            small.new_sampler(name),
            micro_batch_size=steps_with,
            steps=small.STEPS,
        )[1:]
    return found


def noisy_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Draws from every global generator."""
    noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
    return (embeddings.square().mean(dim=1) * torch.rand(len(labels))).sum() * noise


def noisy_losses(micro: int | None) -> list[float]:
    history = small.fit(
        small.new_tower(),
        noisy_loss,
        small.new_sampler("squared"),
        micro_batch_size=micro,
        steps=3,
    )[2]
    return [record["loss"] for record in history.steps]


def noisy_batches(sampler: str) -> list[list[int]]:
    """The images of each batch, from a sampler that draws from global generators."""
    indices: Any = {
        "torch": lambda: RandomSampler(range(64)),
        "pytorch-metric-learning": lambda: small.MPerClassSampler(
            small.LABELS, 4, length_before_new_iter=64
        ),
    }[sampler]()
    seen: list[list[int]] = []

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.tolist())
        return embeddings.square().mean()

    small.fit(
        small.new_tower(),
        loss,
        BatchSampler(indices, 16, drop_last=True),
        steps=7,
        labels=list(range(64)),
    )
    return seen


def noisy_tower(micro: int | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """First gradients, and the noise of the passes without and with gradient."""
    noise = small.Noise("torch")
    first, _, _ = small.fit(
        small.new_tower(noise),
        small.new_loss("squared"),
        small.new_sampler("squared"),
        micro_batch_size=micro,
    )
    return first, noise.without_gradient, noise.with_gradient


def streamed(differing: bool) -> tuple[list[float], str]:
    """Losses on the batches of a stream, or why there are none."""
    stream = list(zip(small.pictures(), small.LABELS, strict=True))
    if differing and Accelerator().process_index:
        stream.reverse()
    tower = small.new_tower()
    batches = StreamBatches(stream, tower.preprocess, 4, 4, buffer_size=32)
    finetuner = Finetuner(tower, small.new_loss("squared"), learning_rate=1e-2)
    try:
        history = finetuner.fit(batches, max_steps=5)
    except ValueError as error:
        return [], str(error)
    return [record["loss"] for record in history.steps], ""


def refusals() -> dict[str, str]:
    norm = nn.BatchNorm1d(small.DIMENSION)
    attempts = {
        "batch": lambda: small.fit(
            small.new_tower(), small.new_loss("squared"), small.Batches([list(range(7))])
        ),
        "batch norm": lambda: small.fit(
            small.new_tower(norm), small.new_loss("squared"), small.new_sampler("squared")
        ),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def frozen_batch_norm() -> tuple[list[Tensor], list[Tensor]]:
    """First gradients, and the statistics after three steps."""
    tower = small.new_tower(small.frozen_norm())
    first, _, _ = small.fit(
        tower, small.new_loss("squared"), small.new_sampler("squared"), steps=3, micro_batch_size=3
    )
    return first, [tower.model.extra.running_mean, tower.model.extra.running_var]


def targeted(micro: int | None) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """First gradients with targets, and the steps of a fit that keeps images where they are."""
    given = {"targets": small.targets()}
    first, _, _ = small.fit(
        small.new_tower(),
        TargetSimilarityLoss(),
        small.new_sampler("squared"),
        micro_batch_size=micro,
        fitting=given,
    )
    history = Finetuner(
        small.new_tower(),
        PreservingLoss(small.new_loss("squared"), weight=0.5),
        learning_rate=1e-3,
        micro_batch_size=micro,
    ).fit((small.pictures()[:48], small.LABELS[:48]), keep=small.pictures()[48:], batch_size=32)
    return first, history.steps


def disagreements(names: list[str]) -> dict[str, str]:
    """What is said where the last process does something else."""
    accelerator = Accelerator()
    other = accelerator.process_index == accelerator.num_processes - 1
    pictures, labels = small.pictures(), list(small.LABELS)
    said = {}
    for name in names:
        data: Any = (pictures, labels)
        settings: dict[str, Any] = {"learning_rate": 1e-3}
        fitting: dict[str, Any] = {"sampler": small.new_sampler("squared"), "max_steps": 2}
        if other:
            if name == "images":
                data = (255 - pictures, labels)
            elif name == "fewer images":
                data = (pictures[:48], labels[:48])
                fitting["sampler"] = small.Batches([list(range(32))])
            elif name == "labels":
                data = (pictures, labels[1:] + labels[:1])
            elif name == "evaluation":
                fitting["eval_dataset"] = (pictures, [label % 2 for label in labels])
            elif name == "batches":
                fitting["sampler"] = small.Batches(small.shuffled_batches()[::-1])
            elif name == "steps":
                fitting["max_steps"] = 3
            elif name == "micro-batches":
                settings["micro_batch_size"] = 4
            elif name == "averages":
                settings["callbacks"] = [WeightAverage(0.5)]
            elif name in ("seed", "learning_rate"):
                settings[name] = {"seed": 1, "learning_rate": 1e-2}[name]
        if name == "evaluation":
            fitting.setdefault("eval_dataset", data)
        loss = small.new_loss("squared")
        if name == "loss":
            factor, squared = 1 + other, loss
            loss = lambda z, of, factor=factor, squared=squared: factor * squared(z, of)  # noqa: E731
        if name == "optimizer":
            settings = {"optimizer": partial(torch.optim.SGD, lr=0.1 if other else 0.2)}
        try:
            Finetuner(small.new_tower(), loss, **settings).fit(data, **fitting)
        except ValueError as error:
            said[name] = str(error)
    return said


def failing() -> str:
    """The last process fails, and ends; what the others say."""
    accelerator = Accelerator()

    class Fail(Callback):
        def on_step(self, fit: Any) -> None:
            if fit.step == 2 and accelerator.process_index == accelerator.num_processes - 1:
                raise KeyError("of its own")

    try:
        Finetuner(small.new_tower(), small.new_loss("squared"), callbacks=[Fail()]).fit(
            (small.pictures(), small.LABELS), batch_size=32, max_steps=4
        )
    except (RuntimeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Watcher(Callback):
    """Keeps what a callback sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, ...]] = []

    def on_step(self, fit: Any) -> None:
        self.seen.append((fit.embeddings.clone(), fit.labels.clone(), fit.gradient.clone()))


class Buffered(nn.Module):
    """A loss with parameters and buffers of every kind."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.proxies = nn.Parameter(
            torch.randn(small.NUM_CLASSES, small.DIMENSION, generator=generator)
        )
        self.scale = nn.Parameter(torch.rand((), generator=generator))
        self.frozen = nn.Parameter(torch.rand(3, generator=generator), requires_grad=False)
        self.register_buffer("mean", torch.rand(small.DIMENSION, generator=generator))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("seen", torch.tensor([seed == 0, True]))
        self.register_buffer("across", torch.rand(2, 3, generator=generator).T)
        self.register_buffer("none", None)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.mean.lerp_(embeddings.detach().mean(dim=0), 0.1)
        self.count += 1
        centred = embeddings - self.mean
        return self.scale * (centred - self.proxies[labels]).square().mean() * self.frozen.sum()


def agreement() -> dict[str, Any]:
    """Everything that must be equal on all processes, which start from different weights."""
    rank = Accelerator().process_index
    tower, loss = small.new_tower(seed=rank), Buffered(rank)
    watcher, average = Watcher(), WeightAverage(0.5)
    finetuner = Finetuner(
        tower,
        loss,
        learning_rate=1e-2,
        micro_batch_size=3,
        callbacks=[watcher, average, CollapseMonitor(0.9999)],
    )
    dataset = small.pictures(), small.LABELS
    history = finetuner.fit(dataset, batch_size=16, max_steps=5, eval_dataset=dataset, eval_every=2)
    return {
        "tower": dict(tower.state_dict()),
        "loss": dict(loss.state_dict()),
        "history": history.to_dict(),
        "seen": watcher.seen,
        "averages": average.averages,
    }


class Stopper(Callback):
    """Stops on the last process only."""

    def __init__(self, where: str) -> None:
        self.where = where

    def stop(self, fit: Any, where: str) -> None:
        last = fit.accelerator.process_index == fit.accelerator.num_processes - 1
        if last and where == self.where:
            fit.stop("enough")

    def on_fit_start(self, fit: Any) -> None:
        self.stop(fit, "on_fit_start")

    def on_step(self, fit: Any) -> None:
        if fit.step == 2:
            self.stop(fit, "on_step")

    def on_evaluation(self, fit: Any) -> None:
        self.stop(fit, "on_evaluation")


def stopped(where: str) -> dict[str, Any]:
    """A callback of one process stops a fit, and another fit follows."""
    tower = small.new_tower()
    finetuner = Finetuner(tower, small.new_loss("squared"), callbacks=[Stopper(where)])
    dataset = small.pictures(), small.LABELS
    history = finetuner.fit(dataset, batch_size=16, max_steps=6, eval_dataset=dataset, eval_every=3)
    steps = len(history.steps)
    finetuner.callbacks = []
    more = finetuner.fit(dataset, batch_size=16, max_steps=2)
    return {
        "steps": steps,
        "reason": history.stop_reason,
        "more": len(more.steps),
        "weights": small.weights(tower),
    }


def two_fits(precision: str) -> list[Tensor]:
    """One after another with the same Accelerator, the second without micro-batches."""
    accelerator = Accelerator(mixed_precision=precision)
    tower, loss = small.new_tower(), small.new_loss("arcface")
    for micro in (3, None):
        small.fit(
            tower,
            loss,
            small.new_sampler("arcface"),
            steps=3,
            micro_batch_size=micro,
            accelerator=accelerator,
        )
    return small.weights(tower, loss)


def regularised(micro: int | None) -> list[Tensor]:
    """First gradients of a loss that has a word on the tower's weights too."""
    tower = small.new_tower()
    return small.fit(
        tower,
        small.with_decay(small.new_loss("squared"), tower),
        small.new_sampler("squared"),
        micro_batch_size=micro,
    )[0]


class Unused(nn.Module):
    """Has a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings


def unused_parameter() -> list[Tensor]:
    """Trains with an Accelerator that lets DDP look for it."""
    options = DistributedDataParallelKwargs(find_unused_parameters=True)
    return small.fit(
        small.new_tower(Unused()),
        small.new_loss("squared"),
        small.new_sampler("squared"),
        steps=3,
        micro_batch_size=4,
        accelerator=Accelerator(kwargs_handlers=[options]),
    )[1]


class Sometimes(nn.Module):
    """Has a parameter that takes part in the first piece of four on process 0, in no other."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(small.DIMENSION))
        self.calls = 0

    def forward(self, embeddings: Tensor) -> Tensor:
        if not self.training:
            return embeddings
        self.calls += 1
        first = self.calls % 4 == 1 and distributed.get_rank() == 0
        return embeddings + self.shift if first else embeddings


def sometimes() -> list[Tensor]:
    """First gradients; the last of the parameters is used in one piece of eight."""
    options = DistributedDataParallelKwargs(find_unused_parameters=True)
    return small.fit(
        small.new_tower(Sometimes()),
        small.new_loss("squared"),
        small.new_sampler("squared"),
        micro_batch_size=4,
        accelerator=Accelerator(kwargs_handlers=[options]),
    )[0]


def compressed() -> list[Tensor]:
    options = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)
    return small.fit(
        small.new_tower(),
        small.new_loss("squared"),
        small.new_sampler("squared"),
        accelerator=Accelerator(kwargs_handlers=[options]),
    )[0]


def reductions(micro: int | None) -> int:
    """How often the gradients are added up over the processes in two steps."""
    count = 0

    def hook(state, bucket):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        bucket.buffer().div_(distributed.get_world_size())
        reduced = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])

    # DDP looks at the annotations themselves, not at their text.
    hook.__annotations__ = {"bucket": distributed.GradBucket, "return": Future[Tensor]}

    class Counting(nn.parallel.DistributedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, bucket_cap_mb=1000)
            self.register_comm_hook(None, hook)

    accelerators.DistributedDataParallel = Counting  # in this process, which ends after the case
    small.fit(
        small.new_tower(),
        small.new_loss("squared"),
        small.new_sampler("squared"),
        steps=2,
        micro_batch_size=micro,
    )
    return count


def checkpointed(
    folder: str, *, kill_at: int | None = None, resume: bool = False, micro: int | None = None
) -> dict[str, Any]:
    """A fit of six steps, whose last process gets a SIGTERM in a step; or its continuation."""

    class Kill(Callback):
        def on_step(self, fit: Any) -> None:
            last = fit.accelerator.process_index == fit.accelerator.num_processes - 1
            if fit.step == kill_at and last:
                os.kill(os.getpid(), signal.SIGTERM)

    tower, loss = small.new_tower(), small.new_loss("arcface")
    finetuner = Finetuner(
        tower,
        loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=small.RATE, momentum=0.9),
        max_grad_norm=None,
        micro_batch_size=micro,
        callbacks=[Kill()],
    )
    code = None
    steps = 0
    try:
        history = finetuner.fit(
            (small.pictures(), small.LABELS),
            batch_size=16,
            max_steps=6,
            checkpoint_dir=Path(folder),
            checkpoint_every=2,
            resume=resume,
        )
        steps = len(history.steps)
    except SystemExit as exit:
        code = exit.code
    return {"code": code, "steps": steps, "weights": small.weights(tower, loss)}


class Jitter:
    """A random transform, from every global generator."""

    def __call__(self, image: Image.Image) -> Tensor:
        noise = random.random() + np.random.rand() + torch.rand(3, 8, 8)  # noqa: NPY002
        return small.to_tensor(image) + noise


def jittered(workers: int) -> list[Tensor]:
    """The embeddings of three batches of randomly transformed images."""
    tower = small.new_tower()
    tower.preprocess = Jitter()
    watcher = Watcher()
    finetuner = Finetuner(tower, small.new_loss("squared"), callbacks=[watcher])
    finetuner.fit((small.pictures(), small.LABELS), batch_size=16, max_steps=3, num_workers=workers)
    return [embeddings for embeddings, _, _ in watcher.seen]


def cached_features(folder: str) -> dict[str, Any]:
    """Where features of images went, and what is said where they can't be computed."""
    trunk, _ = random_tower(image_size=8, patch_size=4).split(0)
    pictures, labels = small.pictures()[:11], list(small.LABELS[:11])
    cached = cache_features(trunk, (pictures, labels), folder, batch_size=2)
    found: dict[str, Any] = {"path": str(cached.path), "rows": [row for row, _ in cached]}
    again = cache_features(trunk, (pictures, labels), folder, batch_size=2)
    found["again"] = again.path == cached.path
    if not distributed.is_initialized():
        return found
    rank = distributed.get_rank()

    class Failing:
        """Fails on the last process when an image is read for the third time."""

        targets, reads = labels, 0

        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            self.reads += rank == 1 and index == 2
            if self.reads == 3:
                raise OSError("the disk is gone")
            return pictures[index], labels[index]

    attempts: dict[str, tuple[Any, str]] = {
        "image": (Failing(), folder),
        "labels": ((pictures, labels[rank:] + labels[:rank]), folder),
        "place": ((pictures, labels), str(cached.path / "below")),
    }
    for name, (images, place) in attempts.items():
        try:
            cache_features(trunk, images, place, batch_size=2)
        except (ValueError, RuntimeError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def embeddings(counts: list[int]) -> dict[str, Any]:
    """Embeddings of images, by all processes together, and what is said where they can't be."""
    tower, rank = small.new_tower(), distributed.get_rank()
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (max(counts), 16, 16, 3), dtype=np.uint8)
    found: dict[str, Any] = {
        str(count): embed_images(tower, pictures[:count], batch_size=4) for count in counts
    }
    index = ImageIndex.build(tower, pictures)
    found["index"] = index.embeddings
    if rank == 1:  # a search is of one process
        found["match"] = index.search(pictures[2], k=1)[0].index
    files = [*pictures[:5], "missing.png"]
    last = rank == distributed.get_world_size() - 1
    other_tower = random_tower(image_size=8, patch_size=4, embedding_dim=5 if last else 6)
    attempts: dict[str, Any] = {
        "missing": lambda: embed_images(tower, files),
        "other": lambda: embed_images(tower, pictures[: 5 + rank]),
        "place": lambda: embed_images(tower, pictures, out=[] if last else None),
        "size": lambda: embed_images(other_tower, pictures),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
