"""What a frozen trunk gives for a dataset: computed once, kept in a file, trained on."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pairclip import _checks, _files
from pairclip._files import MappedTensors, bytes_of, write_header
from pairclip._progress import progress
from pairclip._randomness import random_state
from pairclip.datasets import LabelledImages
from pairclip.embedding import Pixels, pixel_batches
from pairclip.towers import VisionTower
from pairclip.towers.vision_tower import Trunk

# The first had no checksums.
_FORMATS = "pairclip features 1", "pairclip features 2"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Images that are decoded to tell one dataset from another, where each image's file or values
# are looked at too, and where only these few are.
_SAMPLE, _LARGE_SAMPLE = 16, 256


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
        tensors = _open(self.path)
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
            if _checksum_of(features) != bytes(bytes_of(self._checksums[index])):
                raise ValueError(
                    f"'{self.path}' is damaged: the checksum of image {index} differs. Delete it; "
                    "`cache_features` computes it again."
                )
            self._checked[index] = 1
        return features, label

    def __reduce__(self) -> tuple[type[CachedFeatures], tuple[Path]]:
        return CachedFeatures, (self.path,)


def cache_features(
    trunk: VisionTower,
    dataset: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
    num_workers: int = 0,
) -> CachedFeatures:
    """Compute a frozen trunk's features of a dataset once, and keep them in a file.

    ``Finetuner(head, loss).fit(features)``, `evaluate` and `embed_images` take the result with
    the head of the same split. A file that is there already is opened, not computed again. It is
    found by the trunk's fingerprint, which includes the preprocessing; by `dtype`; and by the
    data: class ids and names; of each image, path, size and time of its file, or its values where
    the dataset holds them in memory; and the decoded pixels of 16 images, so that a changed
    transform is noticed (of 256, spread evenly, where neither files nor values are at hand).

    An image costs ``T * H`` numbers: for ViT-B/32 75 kB in float16, 3.8 GB for 50,000.

    Args:
        trunk: The first part of ``tower.split(k)``.
        dataset: Any labelled dataset that `LabelledImages` takes, without random transforms.
        folder: Where the file goes; made if it is missing. It is written under a hidden name
            first, so a killed run leaves no half a file. What killed runs left is removed after
            a day.
        dtype: ``torch.float16``, ``torch.bfloat16`` or ``torch.float32``.
        batch_size: Images per forward pass.
        num_workers: Processes that load and preprocess images; 0 does it in this one.

    Returns:
        The features, a dataset.

    Raises:
        ValueError: If reading an image twice gives different pixels or draws random numbers, an
            image can't be read, or a feature is not finite in `dtype`.
        TypeError: If `trunk` isn't one, or `dataset` is of features already.
        OSError: If the disk is too small; no file is left then.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pairclip import AllPairsCosineLoss, Finetuner
        >>> from pairclip.features import cache_features
        >>> from pairclip.towers import random_tower
        >>> trunk, head = random_tower().split(1)
        >>> images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        >>> labels = [0, 0, 0, 0, 1, 1, 1, 1]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = cache_features(trunk, (images, labels), folder)
        ...     history = Finetuner(head, AllPairsCosineLoss()).fit(features, batch_size=4)
        >>> features[0][0].shape, features[0][0].dtype, len(history.steps)
        (torch.Size([5, 32]), torch.float16, 2)
    """
    if not isinstance(trunk, Trunk):
        raise TypeError(
            f"`trunk` must be the first part of `tower.split(k)`, got {type(trunk).__name__}."
        )
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, _DTYPES))}, got {dtype}.")
    _checks.check_positive_int("batch_size", batch_size)
    _checks.check_count("num_workers", num_workers)
    folder = Path(folder).absolute()
    if folder.is_file():
        raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
    data = LabelledImages(dataset)
    if data.of_features:
        raise TypeError("`dataset` must be of images, got features that are cached already.")
    pixels = Pixels(data, trunk.preprocess)
    key = _key(trunk, pixels, dtype)
    path = folder / f"features-{key[:32]}.safetensors"
    if path.exists():
        try:
            found = CachedFeatures(path)
            if found.metadata["key"] != key:
                raise ValueError(f"'{path}' has the features of other data.")
            for index in range(len(found)):
                _ = found[index]
        except ValueError as error:
            warnings.warn(f"{error} The features are computed again.", stacklevel=2)
        else:
            print(f"Found the features of these {len(found)} images in '{path}'.")
            return found
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": _FORMATS[1], "key": key, "class_names": json.dumps(data.class_names)}
    batches = pixel_batches(pixels, batch_size=batch_size, num_workers=num_workers)
    _write(path, _features(trunk, batches, dtype), data.labels, metadata)
    return CachedFeatures(path)


def _open(path: Path) -> MappedTensors:
    """Metadata, labels, features and their checksums, mapped; all but the features checked."""
    tensors = MappedTensors(path)
    metadata = tensors.metadata
    if metadata.get("format") not in _FORMATS:
        raise ValueError(f"'{path}' was not written by `cache_features`.")
    expected = ["features", "labels"] + ["checksums"] * (metadata["format"] == _FORMATS[1])
    if sorted(tensors) != sorted(expected) or not {"key", "class_names"} <= metadata.keys():
        raise ValueError(f"'{path}' is damaged: something is missing.")
    if metadata["format"] == _FORMATS[1] and metadata.get("sha256") != _seal_of(
        metadata, tensors["labels"], tensors["features"].dtype, tensors["features"].shape
    ):
        raise ValueError(f"'{path}' is damaged: the checksum of its labels differs.")
    return tensors


def _seal_of(
    metadata: dict[str, str], labels: Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> str:
    labels_sha256 = hashlib.sha256(bytes_of(labels)).hexdigest()
    fields = {**metadata, "labels": labels_sha256, "dtype": str(dtype), "shape": list(shape)}
    return _files.checksum_of_fields(fields)


def _checksum_of(row: Tensor) -> bytes:
    return hashlib.sha256(bytes_of(row)).digest()[:8]


def _key(trunk: Trunk, pixels: Pixels, dtype: torch.dtype) -> str:
    data = pixels.images
    digest = hashlib.sha256(f"{_FORMATS[0]} {dtype} {trunk.fingerprint()}".encode())
    digest.update(json.dumps(data.class_names).encode())
    digest.update(bytes_of(data.labels))
    all_known = True
    for index in range(len(data)):
        known = data.source.identity(index)
        all_known = all_known and known is not None
        digest.update(known or b"?")
    _add_sample(digest, pixels, _SAMPLE if all_known else _LARGE_SAMPLE)
    return digest.hexdigest()


def _add_sample(digest: hashlib._Hash, pixels: Pixels, count: int) -> None:
    """Add some images' pixels to a digest, and refuse those that are random."""
    for index in np.unique(np.linspace(0, len(pixels) - 1, count).round().astype(int)).tolist():
        before = random_state()
        first, second = pixels[index], pixels[index]
        if random_state() != before or not torch.equal(first, second):
            raise ValueError(
                f"Image {index} of `dataset` is read through a random transform, of which cached "
                "features would repeat one draw for ever. Take the random transforms out of the "
                "dataset; or train on changing images without a cache, after "
                "`tower.freeze(all_but_last=k)`."
            )
        digest.update(bytes_of(first))


def _features(trunk: Trunk, batches: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Batches of features in `dtype`, all of them finite."""
    device = next(trunk.parameters()).device
    done = 0
    for batch in batches:
        exact = trunk(batch.to(device))
        features = exact.to(dtype)
        bad = ~features.isfinite().flatten(1).all(dim=1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            what = f"The features of image {done + row} are not finite"
            if bool(exact[row].isfinite().all()):
                largest = exact[row].abs().max().item()
                raise ValueError(
                    f"{what} in {dtype}: the largest is {largest:.3g}. Pass `dtype=torch.float32`."
                )
            raise ValueError(
                f"{what}, whatever the dtype: the trunk, in {exact.dtype}, gives NaN or infinity. "
                "Check this image and the tower's weights, and keep the tower in float32, as "
                "`dtype=torch.float32` keeps the features."
            )
        yield features
        done += len(features)


def _write(path: Path, batches: Iterable[Tensor], labels: Tensor, metadata: dict[str, str]) -> None:
    """Write the file batch by batch."""
    checksums: list[bytes] = []
    bar = progress(total=len(labels), desc="Caching features", unit="image")
    try:
        with _files.whole_file(path) as file, bar:
            for position, features in enumerate(batches):
                if position == 0:
                    shape = [len(labels), *features.shape[1:]]
                    _check_space(
                        path.parent, 8 * len(labels) + math.prod(shape) * features.itemsize
                    )
                    # The labels first, whose eight bytes each leave the rest aligned.
                    layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {
                        "labels": (labels.dtype, labels.shape),
                        "features": (features.dtype, shape),
                        "checksums": (torch.uint8, [len(labels), 8]),
                    }
                    seal = _seal_of(metadata, labels, features.dtype, shape)
                    write_header(file, layout, {**metadata, "sha256": seal})
                    file.write(bytes_of(labels))
                file.write(bytes_of(features))
                checksums += map(_checksum_of, features)
                bar.update(len(features))
            file.write(b"".join(checksums))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"The disk of '{path.parent}' is full, so no features are cached"
            ) from error
        raise


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"The features need {size / 1e9:,.2f} GB, and the disk of '{folder}' has "
            f"{free / 1e9:,.2f} GB free. Choose another folder",
        )
