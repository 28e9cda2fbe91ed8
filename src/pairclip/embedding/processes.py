"""What several processes do together: an error of one is one of all, and none waits for ever."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

# After which it is said that a process waits for others.
_PATIENCE = 60.0
# As gloo, NCCL and the sockets below them say it.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket closed|Timed out waiting|"
    r"wait timeout after|collective operation timeout"
)


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Say of an error about a connection that another process has failed."""
    try:
        yield
    except RuntimeError as error:
        grouped = distributed.is_available() and distributed.is_initialized()
        said = error.__cause__ is not None
        if said or not grouped or not _LOST.search(str(error)):
            raise
        raise RuntimeError(
            f"Process {distributed.get_rank()} can't go on: another process has failed, was ended, "
            "or did not come in time. What went wrong stands in the output of that one; if it did "
            f"not make this call, let all processes make it ({error})."
        ) from error


class Together:
    """What the processes of a `torch.distributed` group do in step; without one, this one alone.

    Args:
        call: What all of them have to call.
        alone: Whether this process does all, whether there are others or not.

    Attributes:
        process: Number of this one.
        processes: How many there are.
        ended: Whether there is nothing more to tell: all know of an error, or others are gone.
    """

    def __init__(self, call: str, *, alone: bool = False) -> None:
        grouped = distributed.is_available() and distributed.is_initialized() and not alone
        self.call = call
        self.process, self.processes = (
            (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
        )
        self.ended = False

    def gather(self, value: object = None, error: Exception | None = None) -> list[Any]:
        """The value of each process.

        Raises:
            Exception: `error`, which the others are told of.
            RuntimeError: If another process has one, or is not there.
        """
        said = None if error is None else str(error) or repr(error)
        all_of_them: list[Any] = [(value, said)] * self.processes
        if self.processes > 1:
            with self._reaching(), self._waiting_said():
                distributed.all_gather_object(all_of_them, (value, said))
        self.ended = any(its_error is not None for _, its_error in all_of_them)
        if error is not None:
            raise error
        for other, (_, its_error) in enumerate(all_of_them):
            if its_error is not None:
                raise RuntimeError(f"Process {other} failed: {its_error}")
        return [its_value for its_value, _ in all_of_them]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell of an error within to the others, which `gather` meanwhile."""
        try:
            yield
        except Exception as error:
            if not self.ended:
                self.gather(error=error)
            raise

    def share(self, rows: Tensor, source: int, device: torch.device) -> None:
        """Fill rows in memory of the host with those of one process, byte by byte."""
        values = rows.view(-1).view(torch.uint8)
        # NCCL sends from device to device, gloo what lies in memory.
        on_device = distributed.get_backend() == "nccl"
        sent = values.to(device) if on_device else values
        with self._reaching():
            distributed.broadcast(sent, src=source)
        if on_device and source != self.process:
            values.copy_(sent)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        self.ended = True
        with lost_processes_named():
            yield
        self.ended = False

    @contextmanager
    def _waiting_said(self) -> Iterator[None]:
        words = (
            f"Process {self.process} has waited {_PATIENCE:.0f} s for other processes: {self.call} "
            "divides images among all processes, so let all of them call it."
        )
        timer = threading.Timer(_PATIENCE, print, [words], {"file": sys.stderr, "flush": True})
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
