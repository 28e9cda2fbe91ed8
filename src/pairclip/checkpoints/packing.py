"""Nested state as JSON and a flat dict of tensors, and back: what pickle would do, without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# JSON has neither tensors nor tuples nor keys other than strings, so each is a marked dict.
_TENSOR, _TUPLE, _ITEMS = _MARKS = ("__tensor__", "__tuple__", "__items__")


def pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """What JSON can hold of `value`, its tensors put into `tensors`; `where` names it in errors."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy, since two that share memory can't be written.
        tensors[name] = value.detach().to("cpu", copy=True)
        return {_TENSOR: name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        packed = [(key, pack(item, tensors, f"{where}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and key not in _MARKS for key in value):
            return dict(packed)
        return {_ITEMS: [[pack(key, tensors, where), item] for key, item in packed]}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which a checkpoint can't hold. Let "
        "`state_dict` return tensors, numbers, strings, lists, tuples and dicts."
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(unpack(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value[_ITEMS]}
    return {key: unpack(item, tensors) for key, item in value.items()}
