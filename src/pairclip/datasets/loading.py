"""A `DataLoader` whatever the default device is."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader


class HostLoader(DataLoader[Any]):
    """A `DataLoader` that works in memory of the host, whatever the default device is.

    Without a `generator` it has one of its own, and draws nothing from the caller's.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"generator": torch.Generator()} | options)

    def __iter__(self) -> Any:
        # Its generator is the CPU's, and what it draws would be elsewhere; workers know no device.
        with torch.device("cpu"):
            return super().__iter__()
