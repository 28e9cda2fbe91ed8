"""What a loss compares embeddings with: rows that are given, or those of the untouched tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairclip import _checks, _files
from pairclip._randomness import Stream, random_state_kept, seed_all
from pairclip.embedding import embed
from pairclip.finetuner.images import FitImages

_FILE = "targets.safetensors"


def check_targets(loss: Any, targets: Any, images: FitImages) -> Tensor | None:
    """The targets as float32 ``[N, K]``, or raise if they, the images and the loss don't fit.

    None where there are none, or where they are to be the embeddings of the untouched tower.
    """
    takes, name = getattr(loss, "takes_targets", False), type(loss).__name__
    if takes and getattr(loss, "takes_pairs", False):
        raise ValueError(f"`loss` {name} takes pairs and targets; it can't have both.")
    if images.keep is not None and not takes:
        raise ValueError(
            f"`keep` has images of no class, and `loss` {name} would take them for one. Give a "
            "loss that takes targets, such as `PreservingLoss(loss, weight=0.3)`."
        )
    if targets is None:
        if takes and not getattr(loss, "preserves", False):
            raise ValueError(
                f"`loss` {name} takes targets. Give `targets`, a row for each image of `dataset`"
                f"{'' if images.keep is None else ' and then of `keep`'}."
            )
        return None
    if not takes:
        raise ValueError(
            f"`targets` would be ignored: `loss` {name} does not take any. Give a loss that does, "
            "such as `TargetSimilarityLoss`, or one of yours with `takes_targets = True`."
        )
    rows = _checks.as_embeddings("targets", targets, finite=True).detach().float().cpu()
    if len(rows) != len(images):
        kept = "" if images.keep is None else f" and {len(images.keep)} to keep"
        raise ValueError(
            f"`targets` must have a row for each image, got {len(rows)} rows for "
            f"{len(images.data)} images of `dataset`{kept}."
        )
    return rows


def untouched_embeddings(
    tower: Any,
    images: FitImages,
    drawn: Tensor | None,
    seed: int,
    workers: Mapping[str, Any],
    folder: Path | None,
) -> Tensor:
    """Embeddings of a fit's images by the tower before its first step, float32 ``[N, D]``.

    Those of images that are not `drawn` are NaN; None stands for all. A fit that goes on finds
    them beside its checkpoints in `folder`; else the tower is as it was.
    """
    if folder is not None:
        return _read_targets(folder)
    drawn = torch.arange(len(images), device="cpu") if drawn is None else drawn
    with random_state_kept():
        seeded: Any = _Seeded(images, drawn, seed)
        rows = embed(tower, seeded, **workers)
    if len(rows) == len(images):
        return rows
    return rows.new_full((len(images), rows.shape[1]), torch.nan).index_copy_(0, drawn, rows)


class _Seeded:
    """Images whose random transforms draw the same whoever reads them, and in whatever order."""

    def __init__(self, images: FitImages, drawn: Tensor, seed: int) -> None:
        self.images, self.drawn = images, drawn
        self.labels, self.class_names = images.labels[drawn], images.class_names
        self.seed = seed

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = int(self.drawn[index])
        seed_all(Stream.TARGETS, self.seed, item)
        return self.images[item]


def write_targets(folder: Path, targets: Tensor) -> None:
    """Keep the targets beside the checkpoints, for a run that goes on from one."""
    with _files.whole_file(folder / _FILE) as file:
        _files.write_tensors(file, {"targets": targets})


def _read_targets(folder: Path) -> Tensor:
    """What `write_targets` wrote.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    path = folder / _FILE
    try:
        return torch.clone(_files.MappedTensors(path)["targets"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"'{path}', with the embeddings of the tower before the fit, can't be read: {error}. "
            "Without it the fit can't go on from its checkpoints; put it back, or start again in "
            "another `checkpoint_dir`."
        ) from error
