"""Exact search through the segments of an index."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from pairclip import _checks
from pairclip.index.faiss import FaissIndex, faiss_of
from pairclip.index.match import Match, matches_of
from pairclip.index.queries import Searcher, is_one
from pairclip.index.segments import Segment, labels_of, nearest, paths_of


class ExactSearch:
    """What searches an `ImageIndex`, which fills its segments."""

    class_names: list[str] | None
    fingerprint: str
    _segments: list[Segment]
    _searcher: Searcher

    @overload
    def search(
        self,
        queries: Image.Image | str | os.PathLike[str],
        k: int = 10,
        *,
        min_score: float | None = None,
        class_names: Sequence[str] | None = None,
    ) -> list[Match]: ...

    @overload
    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        min_score: float | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Any: ...

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        min_score: float | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Any:
        """Find the images most similar to one image, or to each of several.

        An image that is in the index finds itself first, or a copy of it.

        Args:
            queries: One image, a PIL image, path, array or tensor as `LabelledImages` takes; or
                several: what `embed_images` takes. Or embeddings, floating point ``[Q, D]``, or
                ``[D]`` for one, of any length.
            k: How many to find for each; all that there are, where these are fewer.
            min_score: Leave out what is less similar than this cosine.
            class_names: Look at images of these classes only.

        Returns:
            For one query a list of `Match`, most similar first; for several a list of such lists.

        Raises:
            ValueError: If the index has no tower to embed images with, or its tower has changed;
                if an image can't be read, a shape does not fit, an embedding is not finite, `k` is
                below 1, or the index has no such class.
            TypeError: If an argument is of the wrong kind.
        """
        if min_score is not None:
            _checks.check_in("[-inf, inf]", "min_score", min_score)
        scores, indices = self.nearest_neighbors(queries, k, class_names=class_names)
        starts = [0, *accumulate(map(len, self._segments))]

        def lookup(index: int) -> tuple[str | None, int | None]:
            number = bisect_right(starts, index) - 1
            return self._segments[number].details(index - starts[number])

        matches = matches_of(scores, indices, lookup, self.class_names, min_score)
        return matches[0] if is_one(queries) else matches

    def nearest_neighbors(
        self, queries: Any, k: int = 10, *, class_names: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Like `search`, as tensors, for many queries at once.

        Args:
            queries: As for `search`.
            k: How many to find for each query.
            class_names: As for `search`.

        Returns:
            Scores ``[Q, k]``, descending, and indices, int64 ``[Q, k]``; fewer columns where there
            are fewer images.

        Raises:
            ValueError: As for `search`.
            TypeError: As for `search`.
        """
        k = _checks.check_positive_int("k", k)
        wanted = None if class_names is None else self._ids_of(class_names)
        embeddings = self._searcher.embeddings_of(queries, self._segments[0].rows.shape[1])
        return nearest(self._segments, embeddings, k, wanted)

    def to_faiss(self, factory: str = "Flat", *, nprobe: int | None = None) -> FaissIndex:
        """Make an approximate index of the same images (needs ``pairclip[faiss]``).

        Args:
            factory: What FAISS's ``index_factory`` takes: ``"Flat"`` is exact, ``"IVF4096,Flat"``
                looks at some of 4,096 cells, ``"IVF4096,PQ64"`` keeps 64 bytes of each image.
            nprobe: Cells of an IVF that a search looks at; None is FAISS's own, one.

        Returns:
            The index, which answers as this one. `search_recall` says what it misses.

        Raises:
            ValueError: If FAISS can't make it, or not from this many images.
            ImportError: If FAISS is missing.

        Example:
            >>> import torch
            >>> from pairclip import ImageIndex
            >>> index = ImageIndex(torch.eye(4), labels=None, class_names=None, paths=None,
            ...     fingerprint="none")
            >>> index.to_faiss("Flat").search(torch.tensor([0.0, 3.0, 4.0, 0.0]), k=1)[0].index
            2
        """
        rows = (segment.kept(segment.rows) for segment in self._segments)
        return FaissIndex(
            faiss_of(rows, len(self), factory, nprobe),
            labels=labels_of(self._segments),
            class_names=self.class_names,
            paths=paths_of(self._segments),
            searcher=Searcher(self._searcher.tower, self.fingerprint),
        )

    def __len__(self) -> int:
        return sum(map(len, self._segments))

    def _ids_of(self, class_names: Sequence[str]) -> Tensor:
        if isinstance(class_names, str) or not isinstance(class_names, Iterable):
            raise TypeError(f"`class_names` must be a list of names, got {class_names!r}.")
        asked = [*class_names]
        known = self.class_names
        if known is None:
            raise ValueError("`class_names` can't choose: this index has no class names.")
        there = {*known}
        unknown = [name for name in asked if not isinstance(name, str) or name not in there]
        if unknown or not asked:
            raise ValueError(
                f"`class_names` must be of the index's classes, got {unknown or 'none'}. They are "
                f"{', '.join(map(repr, known[:20]))}{', ...' * (len(known) > 20)}."
            )
        wanted = {*asked}
        ids = [id_ for id_, name in enumerate(known) if name in wanted]
        return torch.tensor(ids, device="cpu")
