"""Progress: a bar on a terminal, and elsewhere nothing, or a line now and then where asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

# Seconds between lines.
_EVERY = 15.0
_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_lines() -> Iterator[None]:
    """Within the block, bars that have no terminal become lines, which a log file can keep."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def progress(items: Any = None, *, desc: str, unit: str, **options: Any) -> tqdm[Any]:
    """A bar of `tqdm` over these items; see `plain_lines` for where there is no terminal."""
    if not _plain.get() or sys.stderr.isatty() or options.get("disable"):
        return tqdm(items, desc=desc, unit=unit, **{"disable": None} | options)
    return tqdm(
        items,
        **{
            **options,
            "desc": desc,
            "unit": unit + ("es" if unit.endswith("ch") else "s"),
            "file": _Lines(),
            "disable": False,
            "leave": False,
            "mininterval": _EVERY,
            "maxinterval": _EVERY,
            "delay": _EVERY,
            "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}{postfix}, {elapsed} so far, "
            "{remaining} to go",
        },
    )


class _Lines:
    """What a bar writes over itself, as lines."""

    def write(self, text: str) -> None:
        """Write a line, unless there is nothing on it."""
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Each line is flushed already."""
