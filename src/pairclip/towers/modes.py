"""The mode of a module, and of each of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module, deeply: bool = True) -> Iterator[None]:
    """Evaluation mode within; afterwards every part has its own mode again."""
    parts = [part for module in modules for part in (module.modules() if deeply else [module])]
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
