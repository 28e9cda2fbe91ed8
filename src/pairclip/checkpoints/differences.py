"""Where the description that a checkpoint holds differs from that of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_SHOWN = 80  # characters of a description


def differences(saved: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two descriptions, nested dicts and lists of plain values, differ; a sentence each."""
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in [*saved, *(key for key in now if key not in saved)]:
            path = f"{name}.{key}" if name else str(key)
            yield from differences(saved.get(key), now.get(key), path)
    elif saved != now:
        there, here = repr(saved), repr(now)
        pairs = enumerate(zip(there, here, strict=False))
        first = next((i for i, (one, other) in pairs if one != other), 0)
        there, here = (_around(first, text) for text in (there, here))
        yield f"{name} is {there} there and {here} here"


def _around(place: int, text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    start = max(0, place - _SHOWN // 3)
    return f"{'...' * (start > 0)}{text[start : start + _SHOWN - 3]}..."
