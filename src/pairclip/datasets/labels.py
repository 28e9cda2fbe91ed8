"""Labels of any kind as class ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pairclip import _checks


def ids_and_names(labels: Any, length: int) -> tuple[Tensor, list[str] | None]:
    """Class ids, int64 ``[N]``, and for labels that are names the name of each id."""
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    array = np.asarray(labels)
    names: list[str] | None = None
    if array.ndim == 1 and (array.dtype.kind in "UST" or _all_strings(array)):
        unique, array = np.unique(array.astype(str), return_inverse=True)
        names = unique.tolist()
    ids = _checks.label_array("labels", array)
    if len(ids) != length:
        raise ValueError(
            f"`labels` must have one label per image, got {len(ids)} labels for {length} images."
        )
    return torch.from_numpy(ids.copy()), names


def _all_strings(array: npt.NDArray[Any]) -> bool:
    return array.dtype == object and all(isinstance(label, str) for label in array)
