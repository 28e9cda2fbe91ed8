"""What is said about images once and not for each of them."""

from __future__ import annotations

import warnings


def say_at_once(kind: str, words: str) -> None:
    """Warn, each time."""
    warnings.warn(words, stacklevel=2)


class Notices:
    """Warns of each kind of thing the first time."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, kind: str, words: str) -> None:
        """Warn, unless something of this kind was said before."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(words, stacklevel=2)
