"""Libraries that only some towers need."""

from __future__ import annotations

import importlib


def needs(library: str, extra: str) -> None:
    """Say how an optional library is installed, where it is missing."""
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"This tower needs {library}, which is not installed. Install it with "
            f"`pip install 'pairclip[{extra}]'`."
        ) from error
