"""Image search: the embeddings of a collection, kept, saved and searched exactly."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pairclip import _checks
from pairclip._files import MappedTensors
from pairclip._vectors import unit_rows
from pairclip.datasets import LabelledImages
from pairclip.embedding import are_images, embed_images
from pairclip.index import storage
from pairclip.similarity import nearest_neighbors
from pairclip.towers import VisionTower

# Rows normalised or searched at once, which bounds the memory of a step.
_ROWS = 65536
# Rows compared at once; more would leave the processor's cache, which costs a few queries most.
_BLOCK = 2048
# Values per weight that are looked at before each search, to notice a tower that was trained.
_SAMPLED = 64


@dataclass(frozen=True)
class Match:
    """An image that a search found.

    Attributes:
        score: Cosine of its embedding and the query's.
        index: Its place in the dataset that the index was built from.
        path: Its file, as the dataset gave it, or None.
        label: Its class id, or None if the index has no labels.
        class_name: Name of its class, or None.

    Example:
        >>> from pairclip import Match
        >>> Match(0.93, 3, "photos/cat/03.jpg", 1, "cat").class_name
        'cat'
    """

    score: float
    index: int
    path: str | None
    label: int | None
    class_name: str | None


class ImageIndex:
    """The embeddings of a collection of images, searched by image or by embedding.

    Made by `build` or `load`. The search is exact: every stored row is compared.

    A tower is known by its fingerprint, so that images are never searched with another one than the
    index was built with. A tower that was trained meanwhile is noticed too: before each search by
    image, a sample of every weight is compared with what it was, and where one differs, the
    fingerprint.

    Attributes:
        embeddings: Unit rows ``[N, D]`` on the CPU, in the dtype of the index; a zero embedding is
            a zero row. Not to be written to: after `load` they are mapped from the file.
        labels: Class id of each image, int64 ``[N]``, or None.
        class_names: Name of each class id, or None.
        paths: File of each image as the dataset gave it, or None where there is none.
        fingerprint: That of the tower the index was built with.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from torch import nn
        >>> from torchvision import transforms
        >>> from pairclip import ImageIndex, load_tower
        >>> tower = load_tower(nn.Flatten(), image_processor=transforms.ToTensor())
        >>> images = np.zeros((3, 4, 4, 3), dtype=np.uint8)
        >>> images[0, :2], images[1, 2:], images[2, :, :2] = 255, 255, 255
        >>> index = ImageIndex.build(tower, (images, ["sky", "sea", "wall"]))
        >>> [(match.class_name, round(match.score, 3)) for match in index.search(images[0], k=2)]
        [('sky', 1.0), ('wall', 0.5)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index.save(folder)
        ...     ImageIndex.load(folder, tower)
        ImageIndex(3 images, embeddings of 48 float16)
    """

    def __init__(
        self,
        embeddings: Tensor,
        *,
        labels: Tensor | None,
        class_names: list[str] | None,
        paths: list[str | None] | None,
        fingerprint: str,
        tower: VisionTower | None = None,
    ) -> None:
        self.embeddings = embeddings
        self.labels = labels
        self.class_names = class_names
        self.paths = paths
        self.fingerprint = fingerprint
        self._tower = tower
        self._sample: Tensor | None = None
        self._mapped: MappedTensors | None = None
        self._saved: tuple[Path, dict[str, Any]] | None = None

    @classmethod
    def build(
        cls,
        tower: VisionTower,
        dataset: Any,
        *,
        dtype: torch.dtype = torch.float16,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> ImageIndex:
        """Embed a collection of images.

        Args:
            tower: Embeds, now and at each search by image.
            dataset: What `embed_images` takes: a labelled dataset, or images alone, such as a list
                of paths. Labels, class names and paths are kept where it has them.
            dtype: Of the embeddings, in memory and on disk: ``torch.float16`` or
                ``torch.float32``. The search is exact over what is stored; a score from float16
                rows is at most 5e-4, and typically 1e-5, off that from float32 ones.
            batch_size: Images per forward pass.
            num_workers: Processes that load and preprocess images; 0 does it in this one.

        Returns:
            The index.

        Raises:
            ValueError: If there are no images, one can't be read, an embedding is not finite, or
                `dtype` is another one.
            TypeError: If `dataset` is neither a dataset nor images.
        """
        if dtype not in storage.DTYPES.values():
            raise ValueError(f"`dtype` must be torch.float16 or torch.float32, got {dtype}.")
        if isinstance(dataset, (str, os.PathLike)):
            raise TypeError(
                f"`dataset` must be a dataset or a list of images, got the path '{dataset}'. List "
                "the files, for instance `sorted(Path(folder).rglob('*.jpg'))`."
            )
        unlabelled = are_images(dataset)
        if unlabelled:
            dataset = (dataset, np.zeros(len(dataset), np.int64))
        images = LabelledImages(dataset)
        fingerprint = tower.fingerprint()
        embeddings = embed_images(tower, images, batch_size=batch_size, num_workers=num_workers)
        paths = [images.source.path(index) for index in range(len(images))]
        return cls(
            torch.cat([unit_rows(rows).to(dtype) for rows in embeddings.split(_ROWS)]),
            labels=None if unlabelled else images.labels,
            class_names=None if unlabelled else images.class_names,
            paths=paths if any(path is not None for path in paths) else None,
            fingerprint=fingerprint,
            tower=tower,
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], tower: VisionTower | None = None) -> ImageIndex:
        """Open a saved index; its embeddings are mapped from the file, not read.

        Sizes and the JSON are checked, checksums only by `verify`. On Linux and macOS an open index
        stays whole when its folder is deleted, or replaced by `save`; don't write into its file.

        Args:
            folder: Where it was saved.
            tower: The tower that it was built with, to search by image. None leaves the search by
                embedding.

        Returns:
            The index.

        Raises:
            FileNotFoundError: If there is no index, or its embeddings are missing.
            ValueError: If a file is damaged, foreign or of a newer format, or `tower` is another
                one than the index was built with.
        """
        folder = Path(folder).absolute()
        header, mapped = storage.read_index(folder)
        index = cls(
            mapped["embeddings"],
            labels=mapped["labels"].clone() if header["has_labels"] else None,
            class_names=header["class_names"],
            paths=header["paths"],
            fingerprint=header["fingerprint"],
            tower=tower,
        )
        index._mapped, index._saved = mapped, (folder, header)
        index._check_tower()
        return index

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index, in place of one that is there.

        A killed process or a full disk leaves the old index or the new one, and no other file of
        the folder is touched. A kill may leave a file that is safe to delete: one named
        ``image_index-*.safetensors`` that ``image_index.json`` does not mention, or
        ``.image_index.json.*`` or ``.tmp*``.

        Args:
            folder: Where to write; made if it is missing.

        Raises:
            FileExistsError: If `folder` is a file.
            OSError: If it can't be written.
        """
        folder = Path(folder).absolute()
        tensors = {"embeddings": self.embeddings}
        if self.labels is not None:
            tensors["labels"] = self.labels
        description = {
            "fingerprint": self.fingerprint,
            "num_images": len(self),
            "embedding_dim": self.embeddings.shape[1],
            "dtype": str(self.embeddings.dtype).removeprefix("torch."),
            "has_labels": self.labels is not None,
            "class_names": self.class_names,
            "paths": self.paths,
        }
        self._saved = folder, storage.write_index(folder, tensors, description)

    def verify(self) -> None:
        """Compare every byte of the saved index with its checksums.

        Raises:
            ValueError: If a file is damaged (the message names it), the folder has another index
                by now, or this one was neither saved nor loaded.
            FileNotFoundError: If a file is missing.
        """
        if self._saved is None:
            raise ValueError("This index was neither saved nor loaded, so it has no file to check.")
        storage.verify_index(*self._saved)

    @overload
    def search(self, queries: Image.Image | str | os.PathLike[str], k: int = 10) -> list[Match]: ...

    @overload
    def search(self, queries: Any, k: int = 10) -> Any: ...

    def search(self, queries: Any, k: int = 10) -> Any:
        """Find the images most similar to one image, or to each of several.

        An image that is in the index finds itself first, or a copy of it.

        Args:
            queries: One image, a PIL image, path, array or tensor as `LabelledImages` takes; or
                several: what `embed_images` takes. Or embeddings, floating point ``[Q, D]``, or
                ``[D]`` for one, of any length.
            k: How many to find for each.

        Returns:
            For one query a list of `Match`, most similar first; for several a list of such lists.

        Raises:
            ValueError: If the index has no tower to embed images with, or its tower has changed;
                if an image can't be read, a shape does not fit, an embedding is not finite, or `k`
                is above the number of images in the index.
            TypeError: If an argument is of the wrong kind.
        """
        scores, indices = self.nearest_neighbors(queries, k)
        found = [
            [self._match(score, index) for score, index in zip(*of_query, strict=True)]
            for of_query in zip(scores.tolist(), indices.tolist(), strict=True)
        ]
        return found[0] if _is_one(queries) else found

    def nearest_neighbors(self, queries: Any, k: int = 10) -> tuple[Tensor, Tensor]:
        """Like `search`, as tensors, for many queries at once.

        Args:
            queries: As for `search`.
            k: How many to find for each query.

        Returns:
            Scores ``[Q, k]``, descending, and indices, int64 ``[Q, k]``.

        Raises:
            ValueError: As for `search`.
            TypeError: As for `search`.
        """
        _checks.check_positive_int("k", k)
        if k > len(self):
            raise ValueError(
                f"`k` must be at most {len(self)}, the number of images in the index, got {k}."
            )
        embeddings = self._embeddings_of(queries)
        if embeddings.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"`queries` must have the embedding size of the index, {self.embeddings.shape[1]}, "
                f"got {embeddings.shape[1]}."
            )
        scores = torch.zeros(len(embeddings), 0)
        indices = torch.zeros(len(embeddings), 0, dtype=torch.int64)
        for start in range(0, len(self), _ROWS):
            rows = self.embeddings[start : start + _ROWS]
            its_scores, its_indices = nearest_neighbors(
                embeddings, rows, min(k, len(rows)), block_size=_BLOCK
            )
            if self._mapped is not None:
                self._mapped.release(rows)
            # Stable, so that of equal scores the first image is kept.
            scores, order = torch.cat([scores, its_scores], dim=1).sort(
                dim=1, descending=True, stable=True
            )
            indices = torch.cat([indices, its_indices + start], dim=1).gather(1, order)
            scores, indices = scores[:, :k], indices[:, :k]
        return scores, indices

    def __len__(self) -> int:
        return len(self.embeddings)

    def __repr__(self) -> str:
        dtype = str(self.embeddings.dtype).removeprefix("torch.")
        return f"ImageIndex({len(self)} images, embeddings of {self.embeddings.shape[1]} {dtype})"

    def _embeddings_of(self, queries: Any) -> Tensor:
        if _are_embeddings(queries):
            rows = queries[None] if queries.ndim == 1 else queries
            return _checks.as_embeddings("queries", rows, finite=True).detach().cpu()
        if self._tower is None:
            raise ValueError(
                "This index was loaded without a tower, so it can be searched by embeddings only. "
                "Give it the one it was built with: `ImageIndex.load(folder, tower)`."
            )
        self._check_tower()
        return embed_images(self._tower, [queries] if _is_one(queries) else queries)

    def _check_tower(self) -> None:
        """Raise if the tower is not, or no longer, the one that the index was built with."""
        if self._tower is None:
            return
        # Version counters of tensors would not do: fused optimizers don't count.
        sample = _sample_of(self._tower)
        if self._sample is not None and torch.equal(sample, self._sample):
            return
        fingerprint = self._tower.fingerprint()
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"`tower` is another one than the index was built with, or was trained since: its "
                f"fingerprint is {fingerprint[:12]}..., that of the index "
                f"{self.fingerprint[:12]}... Their embeddings don't compare. Build the index again "
                "with this tower, or load the tower that built it."
            )
        self._sample = sample

    def _match(self, score: float, index: int) -> Match:
        label = None if self.labels is None else int(self.labels[index])
        names = self.class_names or []
        return Match(
            score,
            index,
            path=None if self.paths is None else self.paths[index],
            label=label,
            class_name=names[label] if label is not None and 0 <= label < len(names) else None,
        )


def _is_one(queries: Any) -> bool:
    """Whether it is one query: an image or an embedding, rather than several."""
    if isinstance(queries, (Image.Image, str, os.PathLike)):
        return True
    return getattr(queries, "ndim", 4) < (2 if _are_embeddings(queries) else 4)


def _are_embeddings(queries: Any) -> bool:
    """Whether it is a floating-point matrix or vector, which no image of ours is."""
    if getattr(queries, "ndim", 0) not in (1, 2):
        return False
    if isinstance(queries, Tensor):
        return queries.is_floating_point()
    return isinstance(queries, np.ndarray) and queries.dtype.kind == "f"


def _sample_of(tower: VisionTower) -> Tensor:
    """Values spread over every weight of a tower, float64 on the CPU."""
    sampled = [
        weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)].double().cpu()
        for weight in [*tower.parameters(), *tower.buffers()]
    ]
    return torch.cat([torch.zeros(0), *sampled])
