"""Features in a file, as a dataset."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pairclip import _files
from pairclip._files import MappedTensors, bytes_of

# The first had no checksums.
FORMATS = "pairclip features 1", "pairclip features 2"


class CachedFeatures(Dataset[tuple[Tensor, int]]):
    """Features in a file of `cache_features`, as a dataset to train the head on.

    The file stays on disk, and what is used of it in the system's page cache; workers of a
    `DataLoader` open it themselves.

    Args:
        path: The file.

    Attributes:
        path: The file.
        labels: Class id of each image, int64 ``[N]``.
        class_names: Name of each class id, or None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or was not written by `cache_features`; the features of
            an image are looked at when they are first asked for.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pairclip.features import CachedFeatures, cache_features
        >>> from pairclip.towers import random_tower
        >>> trunk, head = random_tower().split(1)
        >>> images = np.zeros((2, 16, 16, 3), dtype=np.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = cache_features(trunk, (images, ["cat", "dog"]), folder).path
        ...     features = CachedFeatures(path)
        >>> features.labels, features.class_names
        (tensor([0, 1]), ['cat', 'dog'])
    """

    of_features = True  # what `LabelledImages` tells it by

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        tensors = open_features(self.path)
        self.metadata, self._features = tensors.metadata, tensors["features"]
        self.labels = tensors["labels"].clone()
        names = json.loads(self.metadata["class_names"])
        self.class_names: list[str] | None = names
        self._ids: list[int] = self.labels.tolist()
        self._checksums = tensors["checksums"].clone() if "checksums" in tensors else None
        self._checked = bytearray(len(self._ids))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Features ``[T, H]`` of one image, in the type of the file, and its class id.

        Raises:
            ValueError: If they are damaged, which is looked at when they are first asked for.
        """
        features, label = self._features[index], self._ids[index]
        if self._checksums is not None and not self._checked[index]:
            if checksum_of(features) != bytes(bytes_of(self._checksums[index])):
                raise ValueError(
                    f"'{self.path}' is damaged: the checksum of image {index} differs. Delete it; "
                    "`cache_features` computes it again."
                )
            self._checked[index] = 1
        return features, label

    def __reduce__(self) -> tuple[type[CachedFeatures], tuple[Path]]:
        return CachedFeatures, (self.path,)


def open_features(path: Path) -> MappedTensors:
    """Metadata, labels, features and their checksums, mapped; all but the features checked."""
    tensors = MappedTensors(path)
    metadata = tensors.metadata
    if metadata.get("format") not in FORMATS:
        raise ValueError(f"'{path}' was not written by `cache_features`.")
    expected = ["features", "labels"] + ["checksums"] * (metadata["format"] == FORMATS[1])
    if sorted(tensors) != sorted(expected) or not {"key", "class_names"} <= metadata.keys():
        raise ValueError(f"'{path}' is damaged: something is missing.")
    if metadata["format"] == FORMATS[1] and metadata.get("sha256") != seal_of(
        metadata, tensors["labels"], tensors["features"].dtype, tensors["features"].shape
    ):
        raise ValueError(f"'{path}' is damaged: the checksum of its labels differs.")
    labels = tensors["labels"]
    if labels.dtype != torch.int64 or labels.shape != tensors["features"].shape[:1]:
        raise ValueError(f"'{path}' is damaged: its labels are not a class id for each image.")
    return tensors


def seal_of(
    metadata: dict[str, str], labels: Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> str:
    """Checksum of all but the features."""
    labels_sha256 = hashlib.sha256(bytes_of(labels)).hexdigest()
    fields = {**metadata, "labels": labels_sha256, "dtype": str(dtype), "shape": list(shape)}
    return _files.checksum_of_fields(fields)


def checksum_of(row: Tensor) -> bytes:
    """Checksum of the features of an image."""
    return hashlib.sha256(bytes_of(row)).digest()[:8]
