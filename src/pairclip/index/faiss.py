"""Approximate search by FAISS, for collections that an exact search takes too long for."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairclip import _checks, _files
from pairclip._vectors import unit_rows
from pairclip.index.match import matches_of
from pairclip.index.queries import Searcher, is_one
from pairclip.index.segments import ROWS
from pairclip.index.storage import is_list_of
from pairclip.towers import VisionTower

_HEADER = "faiss_index.json"
_FORMAT, _VERSION = "pairclip.FaissIndex", 1
_FILE = re.compile(r"faiss_index-[0-9a-f]{32}\.safetensors")
_TRAINED_ON = 200_000  # rows that FAISS finds its cells and codes from
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "fingerprint": lambda value: isinstance(value, str),
    "class_names": lambda value: value is None or is_list_of(str)(value),
    "paths": lambda value: value is None or is_list_of(str, type(None))(value),
    "file": lambda value: _FILE.fullmatch(str(value)) is not None,
    "file_sha256": lambda value: isinstance(value, str),
}


def faiss_of(pieces: Iterable[Tensor], count: int, factory: str, nprobe: int | None) -> Any:
    """An index of FAISS of rows, as `ImageIndex.to_faiss` says."""
    if not isinstance(factory, str):
        raise TypeError(f"`factory` must be a text, got {factory!r}.")
    faiss = _library()
    blocks = [block for piece in pieces for block in piece.split(ROWS)]
    size = blocks[0].shape[1]
    try:
        index = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        if nprobe is not None:
            _checks.check_positive_int("nprobe", nprobe)
            faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
        if not index.is_trained:
            step = max(1, -(-count // _TRAINED_ON))
            index.train(_units(torch.cat([block[::step] for block in blocks])))
        for block in blocks:
            index.add(_units(block))
        index.search(_units(blocks[0][:1]), 1)  # what can't be searched says so here
    except RuntimeError as error:
        reason = re.split(r"Error: |\.(?:cpp|h):\d+: ", str(error))[-1].strip()
        given = f"`factory` {factory!r}" + (f" with `nprobe` {nprobe}" if nprobe else "")
        raise ValueError(
            f"{given} can't be made by FAISS of {count} images of {size} numbers: {reason}"
        ) from error
    return index


class FaissIndex:
    """An approximate index of FAISS that answers as the `ImageIndex` it was made from.

    Made by `ImageIndex.to_faiss` or `load`. Its images stay what they are: `add` and `remove` are
    the `ImageIndex`'s, of which this one is made anew.

    Attributes:
        faiss: The index of FAISS itself, to set what its kind has to set.
        class_names: Name of each class id, or None.

    Example:
        >>> import tempfile, torch
        >>> from pairclip import ImageIndex
        >>> from pairclip.index import FaissIndex
        >>> exact = ImageIndex(torch.eye(4), labels=None, class_names=None, paths=None,
        ...     fingerprint="none")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exact.to_faiss("Flat").save(folder)
        ...     index = FaissIndex.load(folder)
        >>> index.search(torch.tensor([0.0, 3.0, 4.0, 0.0]), k=2)[0].index
        2
    """

    def __init__(
        self,
        index: Any,
        *,
        labels: Tensor | None,
        class_names: list[str] | None,
        paths: list[str | None] | None,
        searcher: Searcher,
    ) -> None:
        self.faiss = index
        self.labels = labels
        self.class_names = class_names
        self.paths = paths
        self._searcher = searcher

    @property
    def fingerprint(self) -> str:
        """That of the tower that embedded."""
        return self._searcher.fingerprint

    def search(self, queries: Any, k: int = 10, *, min_score: float | None = None) -> Any:
        """Find images like `ImageIndex.search`: most similar first, and some may be missed.

        To look at some classes only is left to the exact index.

        Args:
            queries: As for `ImageIndex.search`.
            k: How many to find for each; fewer where FAISS found no more.
            min_score: Leave out what is less similar than this cosine.

        Returns:
            As `ImageIndex.search`; scores are FAISS's, of what it keeps.

        Raises:
            ValueError: As for `ImageIndex.search`.
            TypeError: As for `ImageIndex.search`.
        """
        if min_score is not None:
            _checks.check_in("[-inf, inf]", "min_score", min_score)
        scores, indices = self.nearest_neighbors(queries, k)

        def lookup(index: int) -> tuple[str | None, int | None]:
            label = None if self.labels is None else int(self.labels[index])
            return None if self.paths is None else self.paths[index], label

        matches = matches_of(scores, indices, lookup, self.class_names, min_score)
        return matches[0] if is_one(queries) else matches

    def nearest_neighbors(self, queries: Any, k: int = 10) -> tuple[Tensor, Tensor]:
        """Like `search`, as tensors.

        Args:
            queries: As for `search`.
            k: How many to find for each query.

        Returns:
            Scores ``[Q, k]``, descending, and indices, int64 ``[Q, k]``, -1 where none was found.

        Raises:
            ValueError: As for `search`.
            TypeError: As for `search`.
        """
        k = _checks.check_positive_int("k", k)
        embeddings = self._searcher.embeddings_of(queries, self.faiss.d)
        scores, indices = self.faiss.search(_units(embeddings), min(k, len(self)))
        return torch.from_numpy(scores), torch.from_numpy(indices)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index into a folder, beside an `ImageIndex` that may be there.

        Args:
            folder: Where to write; made if it is missing. An earlier one there is replaced.

        Raises:
            OSError: If it can't be written; an earlier one is then as it was.
        """
        faiss = _library()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"faiss": torch.from_numpy(faiss.serialize_index(self.faiss))}
        if self.labels is not None:
            tensors["labels"] = self.labels
        path = folder / f"faiss_index-{uuid.uuid4().hex}.safetensors"
        with _files.locked(folder, "is being written to by another process.", seconds=600):
            with _files.whole_file(path) as file:
                _files.write_tensors(file, tensors)
            header = {
                "format": _FORMAT,
                "version": _VERSION,
                "fingerprint": self.fingerprint,
                "class_names": self.class_names,
                "paths": self.paths,
                "file": path.name,
                "file_sha256": _files.checksum(path),
            }
            _files.write_json(folder / _HEADER, _files.sealed(header))
            for other in folder.iterdir():
                if _FILE.fullmatch(other.name) and other != path:
                    other.unlink(missing_ok=True)
            _files.remove_leftovers(folder, r"\.faiss_index.*\.[0-9a-f]{32}")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], tower: VisionTower | None = None) -> FaissIndex:
        """Read a saved index, checksums included.

        Args:
            folder: Where it was saved.
            tower: The tower that embedded, to search by image. None leaves the search by embedding.

        Returns:
            The index.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If a file is damaged, foreign or of a newer format, or `tower` is another
                one.
            ImportError: If FAISS is missing.
        """
        folder = Path(folder)
        while True:
            header = _read_header(folder)
            path = folder / header["file"]
            try:
                if _files.checksum(path) != header["file_sha256"]:
                    raise ValueError(f"'{path}' is damaged: its checksum differs.")
                tensors = _files.MappedTensors(path)
                break
            except FileNotFoundError as error:  # written anew meanwhile, or truly missing
                if _read_header(folder) == header:
                    raise FileNotFoundError(f"'{path}' is missing.") from error
        index = cls(
            _library().deserialize_index(tensors["faiss"].numpy()),
            labels=tensors["labels"].clone() if "labels" in tensors else None,
            class_names=header["class_names"],
            paths=header["paths"],
            searcher=Searcher(tower, header["fingerprint"]),
        )
        if index.paths is not None and len(index.paths) != len(index):
            raise ValueError(f"'{path}' is damaged: it has not as many images as paths.")
        index._searcher.check_tower()
        return index

    def __len__(self) -> int:
        return int(self.faiss.ntotal)

    def __repr__(self) -> str:
        return f"FaissIndex({len(self)} images, {type(self.faiss).__name__} of {self.faiss.d})"


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _HEADER
    if not path.exists():
        raise FileNotFoundError(f"`folder` '{folder}' has no {_HEADER}, so none was saved there.")
    header = _files.read_json(path)
    if not (isinstance(header, dict) and header.get("format") == _FORMAT):
        raise ValueError(f"'{path}' is no FAISS index of pairclip.")
    _files.check_seal(header, path)
    _files.check_format(header.get("version"), _VERSION, f"'{path}'")
    for field, is_valid in _FIELDS.items():
        if field not in header or not is_valid(header[field]):
            raise ValueError(f"'{path}' is damaged: its field {field!r} is missing or wrong.")
    return header


def _units(rows: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Unit rows as FAISS takes them."""
    return unit_rows(rows).float().contiguous().numpy()


def _library() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "FAISS is missing. Install it: `pip install 'pairclip[faiss]'`."
        ) from error
    return faiss
