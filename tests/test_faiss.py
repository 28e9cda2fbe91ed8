"""Approximate search: FAISS beside the exact index."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pairclip import FaissIndex, ImageIndex, _files, search_recall

faiss = pytest.importorskip("faiss")


def index_of(count: int, size: int = 16, **fields: Any) -> ImageIndex:
    generator = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(count, size, generator=generator))
    absent = {"labels": None, "class_names": None, "paths": None, "fingerprint": "none"}
    return ImageIndex(rows.half(), **{**absent, **fields})


def test_a_flat_one_answers_as_the_exact_one(tmp_path: Path) -> None:
    fields = {"labels": torch.arange(300) % 2, "class_names": ["a", "\udcff"]}
    exact = index_of(300, **fields, paths=[f"{i}.jpg" for i in range(300)])
    exact.remove(range(7))
    queries = 5 * exact.embeddings[:9].float()
    made = exact.to_faiss("Flat")
    exact.save(tmp_path)
    made.save(tmp_path)
    for index in (made, FaissIndex.load(tmp_path)):
        assert (len(index), index.fingerprint) == (293, "none")
        assert repr(index).startswith("FaissIndex(293 images, IndexFlat")
        for one, other in zip(index.search(queries, k=4), exact.search(queries, k=4), strict=True):
            for found, expected in zip(one, other, strict=True):
                assert found.score == pytest.approx(expected.score, abs=1e-4)
                assert vars(found) == {**vars(expected), "score": found.score}
        assert len(index.search(queries[0], k=10**9)) == 293
        assert [m.index for m in index.search(queries[0], min_score=0.999)] == [0]
        assert search_recall(exact, index, queries, k=5) == 1.0
    # Both are in one folder, and neither touches the other.
    exact.save(tmp_path)
    assert len(ImageIndex.load(tmp_path)) == len(FaissIndex.load(tmp_path)) == 293


def test_recall_is_what_is_missed() -> None:
    exact = index_of(2000)
    queries = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    few, more = (exact.to_faiss("IVF20,Flat", nprobe=n) for n in (1, 20))
    assert search_recall(exact, few, queries) < search_recall(exact, more, queries) == 1.0
    _, indices = few.nearest_neighbors(queries, 10)
    _, expected = exact.nearest_neighbors(queries, 10)
    hits = [len({*a} & {*b}) for a, b in zip(indices.tolist(), expected.tolist(), strict=True)]
    assert search_recall(exact, few, queries) == pytest.approx(sum(hits) / 500)
    assert few.faiss.nprobe == 1


def test_of_images_that_are_equally_near_any_counts() -> None:
    fields = {"labels": None, "class_names": None, "paths": None, "fingerprint": "none"}

    class Answering(ImageIndex):
        answers: torch.Tensor

        def nearest_neighbors(self, *_: Any, **__: Any) -> Any:
            return None, self.answers

    # Each of 0, 1, 2, 3 and its copies, 4 apart; all others are at right angles to it.
    rows = torch.eye(4).repeat(5, 1)
    exact, other = ImageIndex(rows, **fields), Answering(rows, **fields)
    last_first = ImageIndex(rows.flip(0), **fields)
    for k in (2, 5, 9):
        other.answers = 19 - last_first.nearest_neighbors(torch.eye(4), k)[1]
        assert search_recall(exact, other, torch.eye(4), k=k) == 1.0
    # What is less near doesn't count, nor what was not found.
    for answers, recall in (([16, 12, 9], 2 / 3), ([1, -1, 8], 1 / 3), ([1, 2, 3], 0.0)):
        other.answers = torch.tensor([answers])
        assert search_recall(exact, other, torch.eye(4)[:1], k=3) == pytest.approx(recall)


def test_image_queries_are_embedded_once(tower, images, monkeypatch) -> None:
    index = ImageIndex.build(tower, images)
    calls: list[int] = []
    tower.register_forward_pre_hook(lambda _, pixels: calls.append(len(pixels[0])))
    assert search_recall(index, index.to_faiss(), images[0][:5], k=3) == 1.0
    assert calls == [5]


def test_a_tower_searches_by_image_and_another_is_refused(tower, images, tmp_path: Path) -> None:
    exact = ImageIndex.build(tower, images)
    made = exact.to_faiss()
    made.save(tmp_path)
    assert made.search(images[0][5], k=1)[0].index == 5
    assert FaissIndex.load(tmp_path, tower).search(images[0][5], k=1)[0].index == 5
    with pytest.raises(ValueError, match="loaded without a tower"):
        FaissIndex.load(tmp_path).search(images[0][5])
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    for search in (lambda: made.search(images[0][5]), lambda: FaissIndex.load(tmp_path, tower)):
        with pytest.raises(ValueError, match="`tower` is another one"):
            search()


@pytest.mark.parametrize("factory", ["HNSW32", "SQ8", "IVF8,Flat", "OPQ8,IVF8,PQ8x4", "Flat,RFlat"])
def test_any_kind_is_saved_and_searched(factory: str, tmp_path: Path) -> None:
    exact = index_of(300, paths=[str(i) for i in range(300)])
    made = exact.to_faiss(factory, nprobe=8 if "IVF" in factory else None)
    made.save(tmp_path)
    loaded = FaissIndex.load(tmp_path)
    queries = exact.embeddings[:20].float()
    recall = search_recall(exact, made, queries, k=3)
    assert recall == search_recall(exact, loaded, queries, k=3) > 0.6
    for one, other in zip(made.search(queries, 3), loaded.search(queries, 3), strict=True):
        assert one == other
        assert [match.path for match in one] == [str(match.index) for match in one]
    assert len(exact.to_faiss(factory).search(queries[0], k=1000)) <= 300


@pytest.mark.parametrize(
    ("factory", "nprobe", "error", "message"),
    [
        (
            "Nonsense",
            None,
            ValueError,
            "^`factory` 'Nonsense' can't be made by FAISS of 30 images "
            "of 16 numbers: could not parse index string Nonsense$",
        ),
        ("IVF100,Flat", None, ValueError, r"'IVF100,Flat' can't be made .*points \(30\)"),
        ("IVF0,Flat", None, ValueError, "'IVF0,Flat' can't be made by FAISS of 30 images"),
        ("IVF2,PQ5", None, ValueError, "should be a multiple of the number of subquantizers"),
        ("HNSW32", 4, ValueError, "'HNSW32' with `nprobe` 4 can't be made.*set parameter nprobe"),
        ("IVF2,Flat", 0, ValueError, "`nprobe` must be at least 1, got 0"),
        (64, None, TypeError, "`factory` must be a text, got 64"),
    ],
)
def test_wrong_kinds(factory: Any, nprobe: int | None, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        index_of(30).to_faiss(factory, nprobe=nprobe)


def test_wrong_queries() -> None:
    exact = index_of(30)
    with pytest.raises(ValueError, match="embedding size of the index, 16, got 3"):
        exact.to_faiss().search(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="`queries` must have at least one image or embedding"):
        search_recall(exact, exact.to_faiss(), torch.zeros(0, 16))
    with pytest.raises(ValueError, match="must have the images of `exact`, got 20 images and 30"):
        search_recall(exact, index_of(20).to_faiss(), torch.zeros(1, 16))
    with pytest.raises(TypeError, match="`exact` must be an ImageIndex, got FaissIndex"):
        search_recall(exact.to_faiss(), exact.to_faiss(), torch.zeros(1, 16))


def test_damage_is_named(tmp_path: Path) -> None:
    index_of(30).to_faiss().save(tmp_path)
    (path,) = tmp_path.glob("faiss_index-*")
    header = tmp_path / "faiss_index.json"
    for file in (path, header):
        content = file.read_bytes()
        for place in range(0, len(content), 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"is damaged|is no FAISS index"):
                FaissIndex.load(tmp_path)
        file.write_bytes(content)
    fields = _files.read_json(header)
    for name, value in (("paths", {}), ("class_names", True), ("file", "../a"), ("paths", [])):
        _files.write_json(header, _files.sealed({**fields, name: value}))
        with pytest.raises(ValueError, match=rf"is damaged: (its field '{name}'|it has not as)"):
            FaissIndex.load(tmp_path)
    newer = _files.sealed({"format": "pairclip.FaissIndex", "version": 2})
    _files.write_json(header, newer)
    with pytest.raises(ValueError, match="has format 2, and this version"):
        FaissIndex.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no faiss_index.json, so none was saved"):
        FaissIndex.load(tmp_path / "none")
