"""Processes that share a fit must do the same: said before the first step, looked at in each."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pairclip.checkpoints import differences
from pairclip.embedding import waiting_said

_FITTING = threading.RLock()
_END = "The time-out of the process group, which `InitProcessGroupKwargs` sets, ends them"


def _none_is_fitting() -> None:
    global _FITTING
    _FITTING = threading.RLock()  # that of a thread which a fork has left behind is held for ever


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_none_is_fitting)


def check_same(accelerator: Accelerator, statement: Mapping[str, Any]) -> None:
    """Raise on all processes, naming those whose statement is not that of the first.

    Args:
        accelerator: Of the fit.
        statement: Nested dicts and lists of plain values: what this process is about to do.

    Raises:
        ValueError: If a process differs from the first.
    """
    if accelerator.num_processes == 1:
        return
    with waiting_said(
        f"all must begin the fit, and one may hang, in reading an image, say. {_END}"
    ):
        first, *others = gather_object([dict(statement)])
    for number, other in enumerate(others, 1):
        different = list(differences(other, first))
        if different:
            raise ValueError(
                f"Process {number} is not about to do what process 0 is (there: process {number}, "
                f"here: process 0): {'; '.join(different)}. Give all processes the same data and "
                "settings; a random split, say, needs a fixed seed."
            )


def sums_over(accelerator: Accelerator, flags: Sequence[bool], step: int) -> list[float]:
    """On how many processes each flag is true, once all have ended a step."""
    mine = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    reduce: Any = accelerator.reduce
    with waiting_said(f"all must end step {step}, and one may hang, in a callback, say. {_END}"):
        sums: list[float] = reduce(mine, "sum").tolist()
    return sums


class BatchDigests:
    """A number for each batch that was drawn and not yet trained on, the same for equal ones."""

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()

    def add(self, batch: Sequence[int]) -> None:
        """Note a batch as the sampler drew it."""
        values = np.asarray([int(index) for index in batch], np.int64)
        digest = hashlib.sha256(values.tobytes()).digest()
        self._waiting.append(int.from_bytes(digest[:7], "little"))

    def check_same(self, accelerator: Accelerator, step: int, loss: float) -> None:
        """Raise on all processes unless all have drawn the same batch for this step.

        And unless all have the same loss of the step before, up to rounding.
        """
        (of_loss,) = struct.unpack("<q", struct.pack("<d", loss))
        mine = torch.tensor([[self._waiting.popleft(), of_loss]], device=accelerator.device)
        gather: Any = accelerator.gather
        with waiting_said(
            f"all must come to step {step}, and one may hang, in reading an image, say. {_END}"
        ):
            digests, losses = gather(mine).T.tolist()
        for number, packed in enumerate(losses):
            (other,) = struct.unpack("<d", struct.pack("<q", packed))
            if not math.isclose(loss, other, rel_tol=1e-3, abs_tol=1e-6):
                raise ValueError(
                    f"At step {step - 1}, `loss` is {other:.6g} on process {number} and {loss:.6g} "
                    f"on process {accelerator.process_index}, of the same embeddings. Give all "
                    "processes the same loss, which draws from no generator of its own."
                )
        for number, digest in enumerate(digests):
            if digest != digests[0]:
                raise ValueError(
                    f"At step {step}, process {number} has drawn another batch than process 0. Let "
                    "`sampler` draw from the global generators of Python, NumPy or torch, which "
                    "are seeded alike, or give it the same seed on all processes; a stream must "
                    "give the same items in the same order to each."
                )


@contextmanager
def one_fit_at_a_time() -> Iterator[None]:
    """Refuse a fit beside one in another thread: both would draw from the global generators.

    Raises:
        RuntimeError: If there is one.
    """
    lock = _FITTING
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "Another thread of this program is in a fit, and both would draw from the same global "
            "random generators. Wait for its end, or start the second fit in a process of its own."
        )
    try:
        yield
    finally:
        lock.release()
