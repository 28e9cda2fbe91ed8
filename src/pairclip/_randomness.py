"""Random numbers that follow from a seed: one stream for each use, and global generators kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch

_T = TypeVar("_T")


class Stream(IntEnum):
    """What a fit's random numbers are for. Checkpoints resume by these values: never change one."""

    BATCHES = 1
    ITEM = 2
    TOWER = 3
    LOSS = 4
    EVALUATION = 5
    TARGETS = 6


class SamplerStream(IntEnum):
    """What a batch sampler's random numbers are for; as fixed as those of `Stream`."""

    ANCHORS = 0
    PARTNERS = 1
    DECK = 2
    KEPT = 3


def sampler_generator(
    stream: SamplerStream, seed: int, epoch: int, *parts: int
) -> np.random.Generator:
    """A generator of its own for one use in one epoch of a batch sampler."""
    return np.random.default_rng((seed, epoch, stream, *parts))


def seed_all(stream: Stream, *parts: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, NumPy and torch, on the CPU and on `device`."""
    seed = int(np.random.SeedSequence((stream, *parts)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - users' transforms, samplers and losses draw from it
    # Not `torch.manual_seed`: it takes a millisecond, for devices that are not there.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def random_state() -> tuple[Any, ...]:
    """State of the global generators of Python, NumPy and torch (CPU); equal where they are."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), (name, np.asarray(keys).tobytes(), *rest), torch_state


def set_random_state(state: tuple[Any, ...]) -> None:
    """Take what `random_state` gave."""
    of_python, (name, keys, *rest), of_torch = state
    random.setstate(of_python)
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards the global generators of Python, NumPy and torch (CPU) are as before."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def drawn_apart(make: Callable[[], Iterator[_T]], stream: Stream, *parts: int) -> Iterator[_T]:
    """What an iterator gives, which draws as if the global generators were seeded for it alone."""
    end: Any = object()
    with random_state_kept():
        seed_all(stream, *parts)
        iterator, state = make(), random_state()
    while True:
        with random_state_kept():
            set_random_state(state)
            item = next(iterator, end)
            state = random_state()
        if item is end:
            return
        yield item
