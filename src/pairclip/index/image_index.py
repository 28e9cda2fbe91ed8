"""Image search: the embeddings of a collection, kept, saved and searched exactly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairclip.index import storage
from pairclip.index.building import check_dtype, embedded, images_of, joined_labels
from pairclip.index.parquet import read_parquet
from pairclip.index.queries import Searcher
from pairclip.index.searching import ExactSearch
from pairclip.index.segments import Segment, labels_of, paths_of, places_of
from pairclip.towers import VisionTower
from pairclip.towers.vision_tower import check_embeds


class ImageIndex(ExactSearch):
    """The embeddings of a collection of images, searched by image or by embedding.

    Made by `build` or `load`. The search is exact: every stored row is compared.

    A tower is known by its fingerprint, so that images are never searched with another one than the
    index was built with. A tower that was trained meanwhile is noticed too: before each search by
    image, a sample of every weight is compared with what it was, and where one differs, the
    fingerprint.

    Attributes:
        class_names: Name of each class id, or None.
        fingerprint: That of the tower the index was built with.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from torch import nn
        >>> from torchvision import transforms
        >>> from pairclip import ImageIndex, load_tower
        >>> preprocess = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
        >>> tower = load_tower(nn.Flatten(), image_processor=preprocess)
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
        paths: Sequence[str | None] | None,
        fingerprint: str,
        tower: VisionTower | None = None,
    ) -> None:
        self.class_names = class_names
        self.fingerprint = fingerprint
        self._segments = [Segment(embeddings, labels, paths)]
        self._searcher = Searcher(tower, fingerprint)
        self._saved: tuple[Path, dict[str, Any]] | None = None

    @property
    def embeddings(self) -> Tensor:
        """Unit rows ``[N, D]`` on the CPU; a zero embedding is a zero row. Not to be written to."""
        rows = [segment.kept(segment.rows) for segment in self._segments]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    @property
    def labels(self) -> Tensor | None:
        """Class id of each image, int64 ``[N]``, or None."""
        return labels_of(self._segments)

    @property
    def paths(self) -> list[str | None] | None:
        """File of each image, or None."""
        return paths_of(self._segments)

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

        Under several processes each embeds a part, as `embed_images` says: let all of them call it,
        and one of them `save`.

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
            RuntimeError: If another process failed, was ended or did not call it.
        """
        check_dtype(dtype)
        check_embeds(tower)
        fingerprint = tower.fingerprint()
        images, labelled = images_of("dataset", dataset)
        segment = embedded(tower, images, dtype, batch_size=batch_size, num_workers=num_workers)
        return cls(
            segment.rows,
            labels=images.labels if labelled else None,
            class_names=images.class_names if labelled else None,
            paths=segment.paths,
            fingerprint=fingerprint,
            tower=tower,
        )

    @classmethod
    def from_parquet(
        cls,
        folder: str | os.PathLike[str],
        tower: VisionTower | None = None,
        *,
        dtype: torch.dtype = torch.float16,
    ) -> ImageIndex:
        """Make an index of embeddings that lie in Parquet files (needs ``pairclip[tables]``).

        Args:
            folder: With files ``*.parquet`` of one row per image: ``vector``, a list of numbers;
                ``path``, a text, and ``label``, a text or an integer, where there are any; other
                columns are not read. Files are read in the order of their names. A field
                ``pairclip.fingerprint`` in their metadata says by which tower.
            tower: The tower that embedded, to search by image. None leaves the search by embedding.
            dtype: As for `build`.

        Returns:
            The index.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a file can't be read, or has no such rows; if sizes or fingerprints
                differ, some labels are missing, or `tower` is another one than the files say, or
                of another size.
            ImportError: If pyarrow is missing.
        """
        check_dtype(dtype)
        if tower is not None:
            check_embeds(tower)
        segment, names, fingerprint = read_parquet(Path(folder), dtype)
        if fingerprint is None:
            fingerprint = "unknown" if tower is None else tower.fingerprint()
        index = cls(
            segment.rows,
            labels=segment.labels,
            class_names=names,
            paths=segment.paths,
            fingerprint=fingerprint,
            tower=tower,
        )
        index._searcher.check_tower()
        if tower is not None and tower.embedding_dim != segment.rows.shape[1]:
            raise ValueError(
                f"`tower` is another one than that of the files '{folder}': it has embeddings of "
                f"{tower.embedding_dim} numbers, they of {segment.rows.shape[1]}."
            )
        return index

    @classmethod
    def load(cls, folder: str | os.PathLike[str], tower: VisionTower | None = None) -> ImageIndex:
        """Open a saved index; its embeddings are mapped from the file, not read.

        Sizes and the checksums of labels, paths and the JSON are checked, embeddings only by
        `verify`; paths are read when one is asked for. On Linux and macOS an open index stays whole
        when its folder is deleted, or replaced by `save`; don't write into its files.

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
        header, segments = storage.read_index(folder)
        index = cls(
            segments[0].rows,
            labels=None,
            class_names=header["class_names"],
            paths=None,
            fingerprint=header["fingerprint"],
            tower=tower,
        )
        index._segments, index._saved = segments, (folder, header)
        index._searcher.check_tower()
        return index

    def add(self, images: Any, *, batch_size: int = 64, num_workers: int = 0) -> None:
        """Embed more images, and put them behind those that are there.

        Under several processes all must call it, as `build`.

        Args:
            images: As for `build`, with labels if the index has them, and without if not. Classes
                are joined by name; new ones come behind.
            batch_size: Images per forward pass.
            num_workers: Processes that load and preprocess images; 0 does it in this one.

        Raises:
            ValueError: As for `build`; or if the index has no tower, its tower has changed, or only
                one of index and images has labels or class names. The index is then as it was.
            TypeError: If `images` is neither a dataset nor images.
            RuntimeError: As for `build`.
        """
        tower = self._searcher.checked_tower()
        data, labelled = images_of("images", images)
        labels, names = joined_labels(
            data, labelled, self._segments[0].labels is not None, self.class_names
        )
        options = {"batch_size": batch_size, "num_workers": num_workers}
        segment = embedded(tower, data, self._segments[0].rows.dtype, **options)
        segment.labels, self.class_names = labels, names
        self._segments.append(segment)

    def remove(self, indices: Any) -> None:
        """Take images out; those behind them move up.

        Args:
            indices: Their places in the index, integers: `Match.index` of a search.

        Raises:
            ValueError: If one is out of range, or no image would be left.
            TypeError: If they are no integers, a mask among them.
        """
        places = places_of(indices)
        if len(places) and not 0 <= int(places[0]) <= int(places[-1]) < len(self):
            wrong = int(places[0]) if int(places[0]) < 0 else int(places[-1])
            raise ValueError(f"`indices` must be in [0, {len(self)}), got {wrong}.")
        if len(places) == len(self):
            raise ValueError("`indices` must leave an image in the index, got all of them.")
        first = 0
        for segment in self._segments:
            count = len(segment)
            own = places[(places >= first) & (places < first + count)] - first
            if len(own):
                segment.remove(own)
            first += count
        self._segments = [segment for segment in self._segments if len(segment)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index, in place of one that is there.

        After `add` and `remove`, the new rows alone are written where the index was saved or loaded
        before. A killed process or a full disk leaves the old index or the new one, and no other
        file of the folder is touched. Writers wait for each other, by the file ``.lock``.

        Args:
            folder: Where to write; made if it is missing.

        Raises:
            FileExistsError: If `folder` is a file.
            OSError: If it can't be written, or another process writes for over ten minutes.
        """
        folder = Path(folder).absolute()
        fields = {
            "fingerprint": self.fingerprint,
            "embedding_dim": self._segments[0].rows.shape[1],
            "dtype": self._dtype,
            "has_labels": self._segments[0].labels is not None,
            "class_names": self.class_names,
        }
        known = self._saved[1] if self._saved is not None and self._saved[0] == folder else None
        header, self._segments = storage.write_index(folder, self._segments, fields, known)
        self._saved = folder, header

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

    def __repr__(self) -> str:
        size = self._segments[0].rows.shape[1]
        return f"ImageIndex({len(self)} images, embeddings of {size} {self._dtype})"

    def __getstate__(self) -> dict[str, Any]:
        segment = Segment(self.embeddings.clone(), self.labels, self.paths)
        return {**vars(self), "_segments": [segment], "_saved": None}

    @property
    def _dtype(self) -> str:
        return str(self._segments[0].rows.dtype).removeprefix("torch.")
