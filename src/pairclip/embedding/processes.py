"""What several processes do together: an error of one is one of all, and none waits for ever."""

from __future__ import annotations

import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, distributed

# Seconds: after which a process is noted as one that waits for others, after which it says so, and
# in which all that wait are noted once one of them has lost another.
_SOON, _PATIENCE, _NOTICE = 0.5, 60.0, 1.0
# As gloo, NCCL and the sockets below them say it.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket closed|Timed out waiting|"
    r"wait timeout after|collective operation timeout"
)
_waits = itertools.count()


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
        raise _lost(error, []) from error


def _named(absent: list[int], otherwise: str) -> str:
    several = "es" * (len(absent) > 1)
    return f"process{several} {' and '.join(map(str, absent))}" if absent else otherwise


def _lost(error: RuntimeError, absent: list[int]) -> RuntimeError:
    who = _named(absent, "another process")
    failed = "have failed, were" if len(absent) > 1 else "has failed, was"
    return RuntimeError(
        f"Process {distributed.get_rank()} can't go on: {who} {failed} ended, or did not "
        "come in time. What went wrong stands in the output there; if the call was not made there, "
        f"let all processes make it ({error})."
    )


@contextmanager
def waiting_said(what: str) -> Iterator[None]:
    """Within, this process waits for others: a minute of it, or an error, says for which.

    Args:
        what: What all processes have to do; the same on all of them.
    """
    wait = _Wait(what)
    threading.Thread(target=wait.watch, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise _lost(error, wait.absent(_NOTICE)) from error
    finally:
        wait.over.set()


class _Wait:
    """A process that waits is noted in what the group keeps, where the others see it."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.over = threading.Event()
        self._key = f"pairclip: {what} {next(_waits)} ".__add__

    def watch(self) -> None:
        if not self.over.wait(_SOON):
            self._asked(lambda store: store.set(self._key(str(distributed.get_rank())), ""))
            if not self.over.wait(_PATIENCE - _SOON):
                print(
                    f"Process {distributed.get_rank()} has waited {_PATIENCE:.0f} s for "
                    f"{_named(self.absent(0), 'other processes')}: {self.what}.",
                    file=sys.stderr,
                    flush=True,
                )

    def absent(self, seconds: float) -> list[int]:
        """Which processes are not noted so many seconds from now; none where nobody can tell."""
        absent: list[int] = []

        def look(store: Any) -> None:
            store.set(self._key(str(distributed.get_rank())), "")
            time.sleep(seconds)
            numbers = range(distributed.get_world_size())
            absent.extend(n for n in numbers if not store.check([self._key(str(n))]))

        # Beside, as it may be lost with the process that has it.
        asking = threading.Thread(target=self._asked, args=[look], daemon=True)
        asking.start()
        asking.join(seconds + 3 * _NOTICE)
        return absent

    @staticmethod
    def _asked(ask: Callable[[Any], object]) -> None:
        with suppress(Exception):  # what is noted makes words clearer, and no more
            ask(distributed.distributed_c10d._get_default_store())


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
            what = f"{self.call} divides images among all processes, so let all of them call it"
            with self._reaching(), waiting_said(what):
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
