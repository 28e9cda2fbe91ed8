"""Embeddings of images by a tower."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pairclip import _checks
from pairclip._files import bytes_of
from pairclip._progress import progress
from pairclip.datasets import LabelledImages
from pairclip.embedding.pixels import batches_on, open_images
from pairclip.embedding.processes import Together
from pairclip.towers import VisionTower
from pairclip.towers.modes import evaluating
from pairclip.towers.preprocess import Preprocess
from pairclip.towers.vision_tower import check_embeds

Precision = Literal["auto", "no", "bf16", "fp16"]
# Batches whose embeddings are on their way from the device while it computes the next.
_UNDER_WAY = 2
_ROWS = 65536  # sent at once from one process to the others
_CALL = "`embed_images`, as `evaluate` and `ImageIndex.build` do,"


def embed_images(
    tower: VisionTower,
    images: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: Precision = "auto",
    out: Any = None,
    on_device: bool = False,
) -> Tensor:
    """Embed every image, without gradient and in evaluation mode.

    Under several processes (a `torch.distributed` group, as ``accelerate launch`` and an
    `Accelerator` make one) each embeds a part, and all get the whole: let all of them call it. One
    that waits for others says so after a minute, and fails after the time-out of the group.

    Args:
        tower: Embeds; its modes are as before afterwards.
        images: Any labelled dataset that `LabelledImages` takes (`CachedFeatures` for the head of
            a split tower), or images alone: a list of PIL images, arrays or tensors, or one array
            ``[N, H, W, 3]`` or tensor ``[N, 3, H, W]``.
        batch_size: Images per forward pass.
        num_workers: Processes that load and preprocess images; 0 does it in this one.
        precision: ``"auto"`` (bfloat16 where the tower is on a GPU that has it), ``"no"``,
            ``"bf16"`` or ``"fp16"`` (on a GPU): what the tower computes in.
        out: Where the embeddings go, float32 ``[N, D]`` on the CPU: a tensor, an array, or a
            `numpy.memmap` of a result that is larger than the memory.
        on_device: Resize and normalise where the tower is, which images are sent to as bytes; a
            uint8 tensor ``[N, 3, H, W]`` may lie there already. For towers of `transformers`, whose
            image processors compute in PyTorch. On the CPU it gives the same pixel values, on
            another device values that are at most two of 256 levels off, or an error.

    Returns:
        float32 ``[N, D]`` on the CPU, not normalised; it shares the memory of `out`, if given.

    Raises:
        ValueError: If there are no images, one can't be read, an embedding is not finite, an
            argument is of another value or shape, processes have different numbers of images, or
            the tower's preprocessing draws at random.
        TypeError: If an argument is of the wrong kind.
        RuntimeError: If another process failed, was ended or did not call it.

    Example:
        >>> import numpy as np
        >>> from pairclip import embed_images
        >>> from pairclip.towers import random_tower
        >>> tower = random_tower(embedding_dim=8)
        >>> embed_images(tower, np.zeros((3, 16, 16, 3), dtype=np.uint8)).shape
        torch.Size([3, 8])
    """
    if isinstance(images, (str, os.PathLike)):
        raise TypeError(f"`images` must be a dataset or a list of images, got the path {images!r}.")
    return embed(
        tower,
        open_images(images),
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        out=out,
        on_device=on_device,
    )


def embed(
    tower: VisionTower,
    images: LabelledImages,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: Precision = "auto",
    out: Any = None,
    on_device: bool = False,
    worker_init_fn: Callable[[int], None] | None = None,
    alone: bool = False,
) -> Tensor:
    """Embed as `embed_images` does; workers call `worker_init_fn` with their number first.

    With `alone`, this process embeds all, whether there are others or not.
    """
    check_embeds(tower)
    together = Together(_CALL, alone=alone)
    count, device = len(images), next((p.device for p in tower.parameters()), torch.device("cpu"))
    share = _share(count, together.process, together.processes)
    prepare: Any = tower.preprocess
    with together.telling():
        batch_size = _checks.check_positive_int("batch_size", batch_size)
        num_workers = _checks.check_count("num_workers", num_workers)
        if isinstance(prepare, Preprocess):
            prepare.check_steady()
            if on_device:
                prepare.check_device(device)
        elif on_device:
            raise ValueError("`on_device` is for images, and this is a part of a split tower.")
        dtype = _dtype_of(precision, device)
        result = None if out is None else _checked_out(out, count)
    classes = hashlib.sha256(bytes_of(images.labels)).hexdigest(), images.class_names
    for other, (its_count, *its_classes) in enumerate(together.gather((count, *classes))):
        if its_count != count:
            raise ValueError(
                f"`images` must be the same on all processes, got {count} on process "
                f"{together.process} and {its_count} on process {other}."
            )
        if its_classes != [*classes]:
            raise ValueError(
                "`images` must be the same on all processes, and process "
                f"{other} has other labels or class names than process {together.process}."
            )
    hidden = None if together.process == 0 else True  # None: where the output is no terminal
    bar = progress(total=count, desc="Embedding", unit="image", leave=False, disable=hidden)
    with together.telling(), bar, torch.inference_mode(), evaluating(tower):
        batches = batches_on(
            device,
            images,
            prepare,
            share,
            on_device=on_device,
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=worker_init_fn,
        )
        arriving: deque[tuple[int, Tensor, Any]] = deque()
        start = share.start
        for pixels in batches:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                embeddings = tower(pixels).float()
            if result is None:
                # Not a tensor of inference alone: others may train on it.
                with torch.inference_mode(mode=False):
                    result = embeddings.new_empty((count, embeddings.shape[1]), device="cpu")
            _check_size(result, embeddings.shape[1])
            arriving.append((start, *_on_its_way(embeddings)))
            start += len(embeddings)
            while len(arriving) > (_UNDER_WAY if start < share.stop else 0):
                _arrive(result, *arriving.popleft())
            bar.update(min(len(embeddings) * together.processes, count - bar.n))
        if result is not None:
            first_row = share.start if together.processes > 1 else None
            rows = result[share.start : share.stop]
            _checks.check_finite("embeddings", rows, first_row=first_row)
    return _from_all(result, together, count, device)


def _dtype_of(precision: str, device: torch.device) -> torch.dtype | None:
    """What the tower computes in; None for what its weights are in."""
    _checks.check_choice("precision", precision, ("auto", "no", "bf16", "fp16"))
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("`precision` 'fp16' needs a GPU, got the CPU. Use 'auto' or 'no'.")
    if precision == "auto":
        on_gpu = device.type == "cuda"
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if bf16 else "no"
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _checked_out(out: Any, count: int) -> Tensor:
    result = out
    if isinstance(out, np.ndarray) and out.flags.writeable:
        try:
            result = torch.from_numpy(out)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`out` can't be shared with PyTorch: {error}") from error
    if not isinstance(result, Tensor):
        raise TypeError(
            f"`out` must be a tensor or an array that can be written to, got {type(out).__name__}."
        )
    if result.dtype != torch.float32 or result.device.type != "cpu" or result.requires_grad:
        raise ValueError(
            f"`out` must be float32 on the CPU, without gradient, got {result.dtype} on "
            f"{result.device}."
        )
    if result.ndim != 2 or len(result) != count or not result.is_contiguous():
        raise ValueError(
            f"`out` must be contiguous and have a row for each of the {count} images, got shape "
            f"{list(result.shape)}."
        )
    return result


def _check_size(result: Tensor, size: int) -> None:
    if result.shape[1] != size:
        raise ValueError(
            f"`out` must have shape [{len(result)}, {size}], as the tower's embeddings, got "
            f"{list(result.shape)}."
        )


def _on_its_way(embeddings: Tensor) -> tuple[Tensor, Any]:
    """The embeddings in memory of the host, or on their way there until an event has come."""
    if embeddings.device.type != "cuda":
        return embeddings.cpu(), None
    host = torch.empty(embeddings.shape, dtype=embeddings.dtype, device="cpu", pin_memory=True)
    host.copy_(embeddings, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(embeddings.device))
    return host, event


def _arrive(result: Tensor, start: int, embeddings: Tensor, event: Any) -> None:
    if event is not None:
        event.synchronize()
    result[start : start + len(embeddings)] = embeddings


def _share(count: int, process: int, processes: int) -> range:
    return range(process * count // processes, (process + 1) * count // processes)


def _from_all(
    result: Tensor | None, together: Together, count: int, device: torch.device
) -> Tensor:
    """The whole of what every process has a share of."""
    sizes = together.gather(None if result is None else result.shape[1])
    first = {size: sizes.index(size) for size in sizes if size is not None}
    if len(first) > 1:
        told = " and ".join(f"{size} numbers on process {n}" for size, n in first.items())
        raise ValueError(
            f"An embedding must have the same size on all processes, got {told}. Give all of them "
            "the same `tower`, and an `out` that fits it."
        )
    if result is None:
        result = torch.empty(count, *first, dtype=torch.float32, device="cpu")
    for other in range(together.processes if together.processes > 1 else 0):
        share = _share(count, other, together.processes)
        for start in share[::_ROWS]:
            together.share(result[start : min(start + _ROWS, share.stop)], other, device)
    return result
