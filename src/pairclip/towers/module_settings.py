"""What decides an embedding beside the weights: the settings of every module."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))
# How a result is computed, not what it is.
_IRRELEVANT = (
    *("training", "checkpoint", "fused", "dropout", "call_super_init", "dump_patches"),
    "target_shift_size",  # of Swin: what was asked for, be the window as large as the image or not
)


def settings_of(model: nn.Module) -> str:
    """Class, numbers and functions of every module: heads and activations are in no weight.

    The same text in every process, on every device, in every mode.
    """
    lines = []
    for name, part in model.named_modules():
        own = {
            key: _described(value)
            for key, value in sorted(vars(part).items())
            if not key.startswith("_") and not any(word in key for word in _IRRELEVANT)
        }
        settings = {key: value for key, value in own.items() if value is not None}
        lines.append(f"{name} {type(part).__qualname__} {settings}")
    return "\n".join(lines)


def _described(value: Any) -> str | None:
    """A plain value, a function by its name; None for all else."""
    if isinstance(value, _PLAIN):
        return str(value)
    if isinstance(value, (tuple, list)):
        parts = [_described(part) for part in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if isinstance(value, partial):
        return f"{_described(value.func)}{value.args}{value.keywords}"
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__qualname__", getattr(value, "__name__", None))
    return None
