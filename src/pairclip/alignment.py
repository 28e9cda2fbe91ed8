"""From the tuned tower's space back into the untouched one's: for texts and for an old index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairclip import _checks
from pairclip._files import MappedTensors, bytes_of, check_format, whole_file, write_tensors
from pairclip._vectors import unit_rows
from pairclip.towers import VisionTower

_FORMAT = 1
_KIND = "pairclip alignment"
# Ridge penalties that are tried, as multiples of the mean eigenvalue of the second moment.
_SHRINKAGES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 3))
_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Alignment:
    """An affine map of embeddings, as `align` fits it.

    Attributes:
        weight: Shape ``[D, D0]``, from the tuned tower's unit rows, float32.
        offset: Shape ``[D0]``, float32.
        shrinkage: The ridge penalty, as a multiple of the mean eigenvalue of the embeddings'
            covariance.
        cosine: Mean cosine of the mapped embeddings with those of the untouched tower, each
            mapped by a fit without it; in ``[-1, 1]``.
        num_images: Images that it was fitted on.
        fingerprints: Of the tuned and the untouched tower, where they were given.
    """

    weight: Tensor = field(repr=False)
    offset: Tensor = field(repr=False)
    shrinkage: float
    cosine: float
    num_images: int
    fingerprints: tuple[str, str] | None = None

    def __call__(self, embeddings: Any) -> Tensor:
        """Take embeddings of the tuned tower into the space of the untouched one.

        Args:
            embeddings: Shape ``[N, D]``, floating point, any length.

        Returns:
            Unit rows, float32 ``[N, D0]``, on the device of `embeddings`: to compare with
            embeddings of texts, and to search an index of the untouched tower by.

        Raises:
            ValueError: If the shape doesn't fit or an embedding is not finite.

        Example:
            >>> import torch
            >>> from pairclip import align
            >>> before = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
            >>> alignment = align(before.flip(1), before)
            >>> cosines = torch.cosine_similarity(alignment(before.flip(1)), before)
            >>> bool((cosines > 0.95).all())
            True
        """
        rows = _unit("embeddings", embeddings)
        if rows.shape[1] != len(self.weight):
            raise ValueError(
                f"`embeddings` must have embedding size {len(self.weight)}, that of the tuned "
                f"tower, got {rows.shape[1]}."
            )
        weight, offset = (each.to(rows.device) for each in (self.weight, self.offset))
        with torch.autocast(rows.device.type, enabled=False):
            mapped: Tensor = unit_rows(torch.addmm(offset, rows.float(), weight))
        return mapped

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            OSError: If it can't be written.

        Example:
            >>> import tempfile, torch
            >>> from pairclip import Alignment, align
            >>> rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
            >>> alignment = align(rows, rows)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     alignment.save(f"{folder}/alignment.safetensors")
            ...     same = Alignment.load(f"{folder}/alignment.safetensors")
            >>> torch.equal(same(rows), alignment(rows))
            True
        """
        settings = {
            "format": _FORMAT,
            "shrinkage": self.shrinkage,
            "cosine": self.cosine,
            "num_images": self.num_images,
            "fingerprints": self.fingerprints,
        }
        tensors = {"weight": self.weight, "offset": self.offset}
        text = json.dumps(settings)
        metadata = {"kind": _KIND, "settings": text, "sha256": _checksum(text, tensors)}
        with whole_file(path) as file:
            write_tensors(file, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, tower: VisionTower | None = None) -> Alignment:
        """Read what `save` wrote.

        Args:
            path: The file.
            tower: The tuned tower, to check that the alignment is of this one.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, holds something else or is of a later version, or
                the alignment is of another tower or doesn't say of which.
        """
        path = Path(path)
        tensors = MappedTensors(path)
        text = tensors.metadata.get("settings", "")
        if tensors.metadata.get("kind") != _KIND:
            raise ValueError(f"'{path}' was not written by `Alignment.save`.")
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        if tensors.metadata.get("sha256") != _checksum(text, copies):
            raise ValueError(f"'{path}' is damaged: its checksum differs.")
        settings = _settings(text, path)
        fingerprints = settings.pop("fingerprints")
        if tower is not None and fingerprints is None:
            raise ValueError(
                f"'{path}' doesn't say of which towers it is. Give `towers` to `align`."
            )
        if tower is not None and fingerprints[0] != tower.fingerprint():
            raise ValueError(f"`tower` must be the tuned tower of '{path}', got another one.")
        return cls(
            weight=copies["weight"],
            offset=copies["offset"],
            fingerprints=None if fingerprints is None else (fingerprints[0], fingerprints[1]),
            **settings,
        )


def align(
    tuned: Any,
    before: Any,
    *,
    shrinkage: float | None = None,
    towers: tuple[VisionTower, VisionTower] | None = None,
) -> Alignment:
    """Fit a map from a tuned tower's embeddings back to those of the untouched tower.

    Fine-tuning an image tower moves it away from the text tower and from every index that was
    made before. This is the way back, for text queries and for the old index: ridge regression in
    closed form, on embeddings of the same images by both towers. No labels are needed; images of
    many kinds are better than those of the tuning alone. For image against image keep the tuned
    embeddings as they are.

    Args:
        tuned: Embeddings by the tuned tower, shape ``[N, D]``, floating point, any length.
        before: Embeddings of the same images by the untouched tower, shape ``[N, D0]``.
        shrinkage: Ridge penalty, as a multiple of the mean eigenvalue of the covariance of
            `tuned`, above 0; None takes the best of 15 by leave-one-out.
        towers: The tuned and the untouched tower, so that the file says which two it joins.

    Returns:
        The map.

    Raises:
        ValueError: If there are fewer than two images, shapes don't fit, an embedding is not
            finite, all of `tuned` are equal, or `shrinkage` is not positive.
        TypeError: If embeddings are not floating point.

    Example:
        >>> import torch
        >>> from pairclip import align
        >>> generator = torch.Generator().manual_seed(0)
        >>> before = torch.randn(200, 8, generator=generator)
        >>> tuned = before @ torch.randn(8, 8, generator=generator)
        >>> align(tuned, before).cosine > 0.9
        True

    References:
        Hoerl and Kennard 1970, "Ridge regression: biased estimation for nonorthogonal problems";
        Allen 1974, "The relationship between variable selection and data augmentation and a
        method for prediction", for leave-one-out in closed form.
    """
    source, target = _unit("tuned", tuned), _unit("before", before)
    target = target.to(source.device)
    if len(source) != len(target) or len(source) < 2:
        raise ValueError(
            "`tuned` and `before` must have a row for each of the same images, two at least, got "
            f"{len(source)} and {len(target)} rows."
        )
    if shrinkage is not None:
        _checks.check_number("shrinkage", shrinkage)
        if not 0 < shrinkage < float("inf"):
            raise ValueError(f"`shrinkage` must be a positive number, got {shrinkage}.")
    fit = _Ridge(source, target)
    candidates = _SHRINKAGES if shrinkage is None else (shrinkage,)
    cosines = [fit.leave_one_out_cosine(each) for each in candidates]
    best = max(range(len(candidates)), key=cosines.__getitem__)
    weight, offset = fit.solution(candidates[best])
    return Alignment(
        weight=weight.float().cpu(),
        offset=offset.float().cpu(),
        shrinkage=candidates[best],
        cosine=cosines[best],
        num_images=len(source),
        fingerprints=None if towers is None else (towers[0].fingerprint(), towers[1].fingerprint()),
    )


class _Ridge:
    """Regression with an intercept, in the basis in which the covariance is diagonal."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.source, self.target = source, target
        self.source_mean = source.mean(dim=0, dtype=torch.float64)
        self.target_mean = target.mean(dim=0, dtype=torch.float64)
        size = source.shape[1]
        moment = torch.zeros(size, size, dtype=torch.float64, device=source.device)
        cross = moment.new_zeros(size, target.shape[1])
        for x, y in self._pieces():
            moment.addmm_(x.T, x)
            cross.addmm_(x.T, y)
        self.eigenvalues, self.basis = torch.linalg.eigh(moment)
        self.eigenvalues.clamp_(min=0)
        self.cross = self.basis.T @ cross
        if not self.eigenvalues[-1] > 1e-12 * len(source):
            raise ValueError(
                "`tuned` must have different rows, but all are equal: the tower has collapsed."
            )

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Centred rows, float64, some at a time."""
        for x, y in zip(self.source.split(_ROWS), self.target.split(_ROWS), strict=True):
            yield x.double() - self.source_mean, y.double() - self.target_mean

    def _inverse(self, shrinkage: float) -> Tensor:
        inverse: Tensor = 1 / (self.eigenvalues + shrinkage * self.eigenvalues.mean())
        return inverse

    def solution(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Weight ``[D, D0]`` and offset ``[D0]``, float64."""
        weight = self.basis @ (self._inverse(shrinkage)[:, None] * self.cross)
        return weight, self.target_mean - self.source_mean @ weight

    def leave_one_out_cosine(self, shrinkage: float) -> float:
        """Mean cosine of each target with what a fit without it makes of its source."""
        inverse = self._inverse(shrinkage)
        weight = inverse[:, None] * self.cross
        total = 0.0
        for x, y in self._pieces():
            turned = x @ self.basis
            leverage = turned.square() @ inverse + 1 / len(self.source)
            residual = (y - turned @ weight) / (1 - leverage).clamp_min(1e-9)[:, None]
            wanted = y + self.target_mean
            total += float(torch.cosine_similarity(wanted - residual, wanted, dim=1).sum())
        return total / len(self.source)


def _settings(text: str, path: Path) -> dict[str, Any]:
    """What `Alignment.save` wrote beside the tensors, each value of its kind."""
    kinds = {"shrinkage": float, "cosine": float, "num_images": int}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if isinstance(settings, dict):
        check_format(settings.pop("format", None), _FORMAT, f"'{path}'")
        towers = settings.get("fingerprints", "missing")
        if settings.keys() == {*kinds, "fingerprints"} and (
            all(isinstance(settings[name], kind) for name, kind in kinds.items())
            and (towers is None or (isinstance(towers, list) and len(towers) == 2))
        ):
            return settings
    raise ValueError(f"'{path}' is damaged: its settings are not those of an alignment.")


def _unit(name: str, embeddings: Any) -> Tensor:
    return unit_rows(_checks.as_embeddings(name, embeddings, finite=True))


def _checksum(settings: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
