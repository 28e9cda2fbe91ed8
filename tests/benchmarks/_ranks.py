"""Failures of processes that share a fit or an embedding: which end, how soon, with what words."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from processes import small
from torch import distributed

from pairclip import (
    Callback,
    Finetuner,
    WeightAverage,
    cache_features,
    embed_images,
    evaluate,
)
from pairclip.towers import random_tower

PATIENCE = 8  # seconds of the process group, which `InitProcessGroupKwargs` sets
SECONDS = 30  # in which all must have ended
_DIFFERS = r"Process 1 is not about to do what process 0 is .*"
_LOST = r"can't go on: (another process|process 1) has failed, was ended, or did not come in time"


class At(Callback):
    """Does something on the last process after a step."""

    def __init__(self, does: Callable[[], object]) -> None:
        self.does = does

    def on_step(self, fit: Any) -> None:
        if fit.step == 2:
            self.does()


def fit(data: Any = None, **options: Any) -> None:
    """A few steps, with what is given for the tower, the loss or `fit`."""
    of_finetuner = {
        name: options.pop(name)
        for name in ("seed", "micro_batch_size", "optimizer", "accelerator")
        if name in options
    }
    callbacks = options.pop("callbacks", [])
    callbacks += [At(options.pop("does"))] if "does" in options else []
    loss = options.pop("loss", small.new_loss("squared"))
    options = {"sampler": small.new_sampler("squared"), "max_steps": 4} | options
    Finetuner(small.new_tower(), loss, callbacks=callbacks, **of_finetuner).fit(
        (small.pictures(), small.LABELS) if data is None else data, **options
    )


def fail() -> None:
    """As code of a user does."""
    raise KeyError("of its own")


def wait() -> None:
    """Longer than anybody waits."""
    time.sleep(3600)


def kill() -> None:
    """As the system does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing_loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Fails at once."""
    raise ValueError("of the loss")


class Images:
    """Of which some can't be read, or never come."""

    def __init__(self, does: Callable[[], object]) -> None:
        self.does = does

    def __len__(self) -> int:
        return len(small.LABELS)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 40:
            self.does()
        return small.pictures()[index], small.LABELS[index]


def embedded(images: Any) -> None:
    """Some images, as a dataset or without labels."""
    embed_images(small.new_tower(), images)


def evaluated(labels: list[int]) -> None:
    """All images."""
    evaluate(small.new_tower(), (small.pictures(), labels))


def norms(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss."""
    return embeddings.square().mean()


def mixed(precision: str) -> Accelerator:
    """An Accelerator in this precision."""
    return Accelerator(mixed_precision=precision, cpu=True)


def cached(images: Any, folder: Path) -> None:
    """The features of all images."""
    trunk, _ = random_tower(image_size=8, patch_size=4).split(0)
    cache_features(trunk, (images, small.LABELS), folder, batch_size=8)


def failures(rank: int, folder: Path) -> dict[str, tuple[Callable[[], object], str]]:
    """What a process does, and what is said by those that end by themselves."""
    pictures, labels, last = small.pictures(), list(small.LABELS), rank == 1
    order = np.random.default_rng(rank).permutation(64)
    drawn = small.Batches([order[:32].tolist(), order[32:].tolist()])
    size = 16 if last else 32
    sized = small.Batches([list(range(start, start + size)) for start in range(0, 64, size)])
    few = 48 if last else 64
    some = small.Batches([list(range(32))])
    other = 255 - pictures if last else pictures
    turned = labels[rank:] + labels[:rank]
    mine = {"does": fail} if last else {}
    return {
        "pixels": (lambda: fit((other, labels)), _DIFFERS + "some images"),
        "labels": (lambda: fit((pictures, turned)), _DIFFERS + "labels"),
        "random split": (
            lambda: fit((pictures[order[:32]], [labels[i] for i in order[:32]]), sampler=some),
            _DIFFERS + "labels",
        ),
        "seed": (lambda: fit(seed=rank), _DIFFERS + "seed"),
        "sampler": (lambda: fit(sampler=drawn), "process 1 has drawn another batch"),
        "evaluation": (lambda: fit(eval_dataset=(pictures, turned)), _DIFFERS + "eval_dataset"),
        "evaluated pixels": (
            lambda: fit(eval_dataset=(other, labels)),
            _DIFFERS + "eval_dataset",
        ),
        "batch size": (lambda: fit(sampler=sized), _DIFFERS + "batches per epoch|another batch"),
        "micro-batches": (lambda: fit(micro_batch_size=4 + rank), _DIFFERS + "micro_batch_size"),
        "images": (
            lambda: fit((pictures[:few], labels[:few]), sampler=some),
            _DIFFERS + "images is 48",
        ),
        "steps": (lambda: fit(max_steps=3 + rank), _DIFFERS + "steps"),
        "optimizer": (
            lambda: fit(optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1 + rank)),
            _DIFFERS + "learning rate",
        ),
        "loss": (lambda: fit(loss=lambda z, of: (1 + rank) * norms(z, of)), "of the same embedd"),
        "precision": (lambda: fit(accelerator=mixed("bf16" if last else "no")), "precision is"),
        "averages": (
            lambda: fit(callbacks=[WeightAverage(0.5)] if last else []),
            "average the weights on 1 of 2",
        ),
        "evaluates others": (lambda: evaluated(turned), "other labels or class names"),
        "raises": (lambda: fit(**mine), _LOST + "|of its own"),
        "raises in the loss": (
            lambda: fit(loss=failing_loss) if last else fit(),
            _LOST + "|of the loss|not about to do",
        ),
        "raises in an image": (lambda: fit(Images(fail) if last else None), _LOST + "|of its own"),
        "raises in a worker": (
            lambda: fit(Images(fail) if last else None, num_workers=1),
            _LOST + "|of its own",
        ),
        "is killed": (lambda: fit(**({"does": kill} if last else {})), _LOST),
        "exits": (lambda: fit(**({"does": sys.exit} if last else {})), _LOST),
        "hangs in a callback": (lambda: fit(**({"does": wait} if last else {})), _LOST),
        "hangs in an image": (lambda: fit(Images(wait) if last else None), _LOST),
        "embeds others": (lambda: embedded(pictures[:few]), "must be the same on all processes"),
        "embeds what fails": (
            lambda: embedded([*pictures[:40], "missing.png" if last else pictures[40]]),
            "Process 1 failed: Image 40|Image 40",
        ),
        "does not embed": (lambda: None if last else embedded(pictures), _LOST),
        "does not evaluate": (lambda: wait() if last else evaluated(labels), _LOST),
        "caches others": (lambda: cached(pictures[:, ::-1] if last else pictures, folder), ""),
        "is killed while it caches": (
            lambda: cached(pictures, folder) if not last else (kill()),
            _LOST,
        ),
    }


NAMES = tuple(failures(0, Path()))


def process(name: str, rank: int, folder: Path) -> None:
    """One of two processes, whose last words go into a file."""
    sys.stdout = sys.stderr = (folder / f"{rank}.err").open("w")
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        failures(rank, folder / "features")[name][0]()
    except Exception as error:
        (folder / f"{rank}.words").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def attempt(name: str, folder: Path) -> Counter[str]:
    """What came of a failure: ``said``, or ``silent``, ``unnamed`` or ``hung``."""
    folder.mkdir(parents=True)
    start = time.monotonic()
    both = [multiprocessing.Process(target=process, args=(name, rank, folder)) for rank in (0, 1)]
    for each in both:
        each.start()
    while any(each.is_alive() for each in both) and time.monotonic() - start < SECONDS:
        time.sleep(0.1)
        codes = [each.exitcode for each in both]
        # As a launcher does: what still hangs after another has failed is ended.
        if "hangs" in name or name == "does not evaluate":
            for each, other in zip(both, codes[::-1], strict=True):
                if other not in (None, 0):
                    each.kill()
    seconds = time.monotonic() - start
    hung = [each.is_alive() for each in both]
    for each in both:
        each.kill()
        each.join()
    words = [
        (path.read_text() if path.exists() else "").replace("\n", " ")
        for path in (folder / f"{rank}.words" for rank in (0, 1))
    ]
    expected = failures(0, folder)[name][1]
    if any(hung):
        result = "hung"
    elif not any(words):
        result = "silent" if expected else "said"
    else:
        result = "said" if all(re.search(expected, each) for each in words if each) else "unnamed"
    if result != "said":
        print(f"  ranks: {name}: {result} after {seconds:.1f} s: {words}")
    return Counter({result: 1, "slow": seconds > SECONDS})
