"""Processes that are killed before the n-th of their file operations."""

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EVENTS = {f"os.{call}" for call in ("mkdir", "rename", "remove", "rmdir", "link", "truncate")}
EVENTS |= {"open", "ctypes.dlsym"}  # which comes before names change places


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that SIGKILLs itself before file operation `number`; whether it did.

    File operations are those that Python announces: opening, making, renaming, removing.
    """
    with warnings.catch_warnings():
        # Python 3.12 and later warn of forks beside threads; the child takes no lock of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        left = number

        def watch(event: str, _: Any) -> None:
            nonlocal left
            if event in (
                "ctypes.dlsym",
                "open",
                "os.mkdir",
                "os.rename",
                "os.remove",
                "os.rmdir",
                "os.link",
            ):
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        status = 1
        try:
            sys.addaudithook(watch)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def every_kill(
    directory: Path, work: Callable[[Path], object], *, at_least: int = 8, stride: int = 1
) -> Iterator[Path]:
    """Copies of the directory, each as a kill at another moment of the work leaves it."""
    number = 0
    while True:
        copied = directory.with_name(f"killed-at-{number}")
        shutil.copytree(directory, copied)
        if not killed_at(number, lambda where=copied: work(where)):
            assert number >= at_least
            return
        yield copied
        number += stride
