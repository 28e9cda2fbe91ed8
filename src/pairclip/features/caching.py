"""`cache_features`: a frozen trunk's features, computed once and written to a file."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairclip import _checks, _files
from pairclip._files import bytes_of, write_header
from pairclip._progress import progress
from pairclip._randomness import random_state
from pairclip.datasets import LabelledImages
from pairclip.datasets.loading import HostLoader
from pairclip.embedding import Pixels, Together
from pairclip.features.cached import FORMATS, CachedFeatures, checksum_of, seal_of
from pairclip.towers import VisionTower
from pairclip.towers.vision_tower import Trunk

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Images that are decoded to tell one dataset from another, where each image's file or values
# are looked at too, and where only these few are.
_SAMPLE, _LARGE_SAMPLE = 16, 256


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

    Under several processes each computes a part, and one on each machine writes all: let all of
    them call it.

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
        RuntimeError: If another process failed, was ended or did not call it.

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
    batch_size = _checks.check_positive_int("batch_size", batch_size)
    num_workers = _checks.check_count("num_workers", num_workers)
    folder = Path(folder).absolute()
    if folder.is_file():
        raise FileExistsError(f"`folder` must be a folder, got the file '{folder}'.")
    data = LabelledImages(dataset)
    if data.of_features:
        raise TypeError("`dataset` must be of images, got features that are cached already.")
    pixels = Pixels(data, trunk.preprocess)
    key, of_all = _keys(trunk, pixels, dtype)
    path = folder / f"features-{key[:32]}.safetensors"
    together = Together("`cache_features`")
    features, trouble = _from_file(path, key)
    statements = together.gather((features is not None, of_all, batch_size))
    for other, (_, *its_own) in enumerate(statements):
        if its_own != [*statements[0][1:]]:
            raise ValueError(
                "`trunk`, the labels of `dataset`, `dtype` and `batch_size` must be the same on "
                f"all processes, and process {other} has others than process 0."
            )
    if features is not None and all(has_file for has_file, *_ in statements):
        if together.process == 0:
            print(f"Found the features of these {len(features)} images in '{path}'.")
        return features
    if trouble is not None:
        warnings.warn(f"{trouble} The features are computed again.", stacklevel=2)
    metadata = {"format": FORMATS[1], "key": key, "class_names": json.dumps(data.class_names)}
    # The batches of one process, in turn, so that the features do not depend on how many there are.
    rounds = range(0, len(pixels), together.processes * batch_size)
    starts = [s + together.process * batch_size for s in rounds]
    share = [i for s in starts for i in range(s, min(s + batch_size, len(pixels)))]
    loader = HostLoader(pixels, batch_size=batch_size, num_workers=num_workers, sampler=share)
    mine = _features(trunk, loader if share else (), dtype, starts)
    device = next(trunk.parameters()).device
    batches = _of_all(mine, rounds, together, device)
    with together.telling():
        # Of the processes on a machine, which share its folders, one writes.
        if together.processes == 1 or int(os.environ.get("LOCAL_RANK", together.process)) == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, batches, data.labels, metadata)
        else:
            deque(batches, maxlen=0)
    together.gather()  # the file is there
    return CachedFeatures(path)


def _from_file(path: Path, key: str) -> tuple[CachedFeatures | None, ValueError | None]:
    """The features that are there already, or what is wrong with them."""
    if not path.exists():
        return None, None
    try:
        features = CachedFeatures(path)
        if features.metadata["key"] != key:
            raise ValueError(f"'{path}' has the features of other data.")
        for index in range(len(features)):
            _ = features[index]
    except ValueError as error:
        return None, error
    return features, None


def _of_all(
    mine: Iterator[Tensor], starts: range, together: Together, device: torch.device
) -> Iterator[Tensor]:
    """Batches of all processes in their order, each of which computes every P-th."""
    if together.processes == 1:
        yield from mine
        return
    for _ in starts:
        with together.telling():
            features = next(mine, None)
        known = None if features is None else (tuple(features.shape), features.dtype)
        round_of_all = []
        for other, layout in enumerate(together.gather(known)):
            if layout is not None:
                shape, dtype = layout
                rows = torch.empty(shape, dtype=dtype, device="cpu")
                if other == together.process and features is not None:
                    rows.copy_(features)
                together.share(rows, other, device)
                round_of_all.append(rows)
        yield from round_of_all


def _keys(trunk: Trunk, pixels: Pixels, dtype: torch.dtype) -> tuple[str, str]:
    """What tells these features from others; and what of it is the same on every machine."""
    data = pixels.images
    digest = hashlib.sha256(f"{FORMATS[0]} {dtype} {trunk.fingerprint()}".encode())
    digest.update(json.dumps(data.class_names).encode())
    digest.update(bytes_of(data.labels))
    of_all = digest.hexdigest()
    all_known = True
    for index in range(len(data)):
        known = data.source.identity(index)
        all_known = all_known and known is not None
        digest.update(known or b"?")
    _add_sample(digest, pixels, _SAMPLE if all_known else _LARGE_SAMPLE)
    return digest.hexdigest(), of_all


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


def _features(
    trunk: Trunk, batches: Iterable[Tensor], dtype: torch.dtype, starts: Iterable[int]
) -> Iterator[Tensor]:
    """Batches of features in `dtype`, all of them finite, of images from these numbers on."""
    device = next(trunk.parameters()).device
    for batch, start in zip(batches, starts, strict=False):
        exact = trunk(batch.to(device))
        features = exact.to(dtype)
        bad = ~features.isfinite().flatten(1).all(dim=1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            what = f"The features of image {start + row} are not finite"
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
                    seal = seal_of(metadata, labels, features.dtype, shape)
                    write_header(file, layout, {**metadata, "sha256": seal})
                    file.write(bytes_of(labels))
                file.write(bytes_of(features))
                checksums += map(checksum_of, features)
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
