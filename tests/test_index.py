"""Search, and an index that is on the disk whole or not at all."""

import json
import math
import pickle
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import every_kill
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pairclip import VisionTower, _files, embed_images, load_tower
from pairclip._files import sealed
from pairclip.index import ImageIndex, Match
from pairclip.index.segments import Segment
from pairclip.index.storage import _checksum_of

HEADER = "image_index.json"
HOSTILE = '<script>"alert(1)"</script>\n\\ & \udcff'


def index_of(embeddings: torch.Tensor, **fields: Any) -> ImageIndex:
    """An index with these very rows, of no tower."""
    absent = {"labels": None, "class_names": None, "paths": None, "fingerprint": "none"}
    return ImageIndex(embeddings, **{**absent, **fields})


def rows_of(count: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, size, generator=generator))


def flat_tower() -> VisionTower:
    """Pixels are the embedding."""
    preprocess = transforms.Compose([transforms.Resize((2, 2)), transforms.ToTensor()])
    return load_tower(nn.Flatten(), image_processor=preprocess)


def tensors_file(folder: Path) -> Path:
    (path,) = folder.glob("image_index-*.safetensors")
    return path


@pytest.fixture
def photos(tmp_path: Path, images: tuple[np.ndarray, list[int]]) -> Path:
    """A folder with twelve of the images, in folders of their classes."""
    for number, (pixels, label) in enumerate(list(zip(*images, strict=True))[:12]):
        folder = tmp_path / "photos" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path / "photos"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    labels = torch.arange(20) % 3
    paths = [f"{i}.jpg" for i in range(20)]
    names = ["ant", "bee", "cat"]
    index_of(rows_of(20).half(), labels=labels, class_names=names, paths=paths).save(folder)
    return folder


# --- Search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_search_is_exact_over_what_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    index_of(rows_of(500).to(dtype)).save(tmp_path)
    index = ImageIndex.load(tmp_path)
    queries = 7 * rows_of(30, seed=1)
    scores, indices = index.nearest_neighbors(queries, k=9)
    stored, exact = index.embeddings.double(), queries.double()
    cosines = nn.functional.normalize(exact) @ nn.functional.normalize(stored).T
    expected, places = cosines.topk(9, dim=1)
    assert index.embeddings.dtype == dtype
    assert torch.equal(indices, places)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)


def test_blocks_change_nothing_and_of_equals_the_first_is_found(monkeypatch) -> None:
    rows = torch.eye(5).repeat(6, 1) * 2.0 ** (torch.arange(30) % 4)[:, None]
    index, queries = index_of(rows.half()), rows_of(4, 5)
    scores, indices = index.nearest_neighbors(queries, k=17)
    monkeypatch.setattr("pairclip.index.segments.ROWS", 14)
    monkeypatch.setattr("pairclip.index.segments._BLOCK", 7)
    index = index_of(rows.half())
    for _ in range(2):
        in_blocks = index.nearest_neighbors(queries, k=17)
        assert torch.equal(in_blocks[0], scores)
        assert torch.equal(in_blocks[1], indices)
    assert torch.equal(indices[:, :6], indices[:, :1] % 5 + 5 * torch.arange(6))
    fresh = index_of(rows.half())
    for some in (index, fresh):
        some.remove([29])
        left = [[place for place in row if place != 29][:12] for row in indices.tolist()]
        assert some.nearest_neighbors(queries, k=12)[1].tolist() == left


def test_a_search_leaves_none_of_the_file_in_memory(tmp_path: Path) -> None:
    def resident_kilobytes() -> int:
        name, total = tensors_file(tmp_path).name, 0
        for mapping in Path("/proc/self/smaps").read_text().split("VmFlags"):
            if name in mapping:
                total += int(mapping.split("Rss:")[1].split()[0])
        return total

    index_of(rows_of(20_000, 128).half()).save(tmp_path)
    index = ImageIndex.load(tmp_path)
    index.embeddings.sum()
    assert resident_kilobytes() > 5000
    assert index.search(index.embeddings[12_345], k=1)[0].index == 12_345
    assert resident_kilobytes() < 100
    assert index.search(index.embeddings[12_345], k=1)[0].index == 12_345


def test_float16_moves_no_score_by_more_than_documented(tower, images) -> None:
    def scores_of(dtype: torch.dtype) -> torch.Tensor:
        index = ImageIndex.build(tower, images, dtype=dtype)
        scores, indices = index.nearest_neighbors(images[0], k=48)
        return scores.gather(1, indices.argsort())

    assert (scores_of(torch.float16) - scores_of(torch.float32)).abs().max() < 5e-4


def test_every_image_finds_itself_first_with_what_is_known_of_it(tower, photos: Path) -> None:
    dataset = ImageFolder(photos)
    index = ImageIndex.build(tower, dataset)
    for number, (path, label) in enumerate(dataset.samples):
        best = index.search(path, k=3)[0]
        assert best.score == pytest.approx(1, abs=1e-5)
        assert best == Match(best.score, number, path, label, dataset.classes[label])


def test_a_query_may_be_of_any_kind(tower, photos: Path) -> None:
    dataset = ImageFolder(photos)
    index = ImageIndex.build(tower, dataset)
    path = Path(dataset.samples[5][0])
    image = Image.open(path)
    array = np.asarray(image)
    channels_first = torch.from_numpy(array.copy()).permute(2, 0, 1)
    embedding = embed_images(tower, [image])
    expected = [match.index for match in index.search(path, k=4)]
    one = [str(path), image, array, channels_first, channels_first / 255, embedding[0]]
    for query in [*one, embedding[0].double().numpy()]:
        assert [match.index for match in index.search(query, k=4)] == expected
    several = [[path], [image], [array], array[None], channels_first[None], embedding]
    for queries in [*several, embedding.half(), embedding.numpy(), Subset(dataset, [5])]:
        (found,) = index.search(queries, k=4)
        assert [match.index for match in found] == expected
    two_dimensional = np.asarray(image.convert("L"))
    assert len(index.search(two_dimensional, k=4)) == 4
    assert [len(found) for found in index.search([path, image], k=1)] == [1, 1]


def test_search_does_not_change_the_tower_and_the_bulk_way_agrees(tower, images) -> None:
    tower.train()
    index = ImageIndex.build(tower, images, batch_size=7)
    scores, indices = index.nearest_neighbors(images[0][:5], k=6)
    assert tower.training
    assert (scores.shape, indices.shape, indices.dtype) == ((5, 6), (5, 6), torch.int64)
    found = index.search(images[0][:5], k=6)
    assert [[match.index for match in row] for row in found] == indices.tolist()
    assert [[match.score for match in row] for row in found] == scores.tolist()


# --- What is kept ---------------------------------------------------------------------------------


def test_rows_are_unit_and_a_zero_embedding_stays_zero() -> None:
    images = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    images[0] = 9
    images[2, 0] = 200
    index = ImageIndex.build(flat_tower(), images, dtype=torch.float32)
    torch.testing.assert_close(index.embeddings.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    assert index.search(images[0], k=3)[-1] == Match(0.0, 1, None, None, None)


def test_images_without_labels(tower, photos: Path) -> None:
    files = sorted(photos.rglob("*.png"))
    by_path = ImageIndex.build(tower, files)
    assert by_path.paths == [str(file) for file in files]
    assert by_path.search(files[3], k=1)[0].path == str(files[3])
    opened = ImageIndex.build(tower, [Image.open(file) for file in files])
    assert torch.equal(by_path.embeddings, opened.embeddings)
    assert opened.paths is None
    mixed = ImageIndex.build(tower, [Image.open(files[0]), files[1]])
    assert mixed.paths == [None, str(files[1])]
    for index in (by_path, opened, mixed):
        assert (index.labels, index.class_names) == (None, None)
        best = index.search(files[1], k=1)[0]
        assert (best.index, best.label, best.class_name) == (1, None, None)


def test_subsets_and_joins_keep_labels_names_and_paths(tower, photos: Path) -> None:
    dataset = ImageFolder(photos)
    index = ImageIndex.build(tower, Subset(dataset, [7, 2]))
    assert index.labels is not None
    assert index.labels.tolist() == [dataset.targets[7], dataset.targets[2]]
    assert index.class_names == ["a", "b", "c"]
    assert index.paths == [dataset.samples[7][0], dataset.samples[2][0]]
    joined = ImageIndex.build(tower, ConcatDataset([dataset, Subset(dataset, [4])]))
    assert joined.paths == [*(path for path, _ in dataset.samples), dataset.samples[4][0]]


def test_what_it_says_of_itself(tower, images) -> None:
    index = ImageIndex.build(tower, images)
    assert len(index) == 48
    assert repr(index) == "ImageIndex(48 images, embeddings of 12 float16)"


# --- Wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "k", "error", "message"),
    [
        (rows_of(2), 0, ValueError, "`k` must be at least 1, got 0"),
        (rows_of(2), 2.5, TypeError, "`k` must be an integer, got 2.5"),
        (rows_of(2, 23), 5, ValueError, "embedding size of the index, 24, got 23"),
        (rows_of(2) * torch.nan, 5, ValueError, "`queries` has NaN or infinite values in 2 of 2"),
        (torch.zeros(3, 8, 8), 5, ValueError, "loaded without a tower"),
        ("cat.jpg", 5, ValueError, r"Give it the one.*ImageIndex.load\(folder, tower\)"),
    ],
)
def test_wrong_queries(saved: Path, queries: Any, k: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ImageIndex.load(saved).search(queries, k)


def test_wrong_images_to_build_from(tower, images, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got the path 'photos'. List the files"):
        ImageIndex.build(tower, "photos")
    with pytest.raises(ValueError, match="has no images"):
        ImageIndex.build(tower, [])
    with pytest.raises(ValueError, match=r"Image 0 \(missing.png\) can't be read"):
        ImageIndex.build(tower, ["missing.png"])
    with pytest.raises(ValueError, match=r"`dtype` must be torch.float16 or torch.float32, got"):
        ImageIndex.build(tower, images, dtype=torch.bfloat16)
    with torch.no_grad():
        next(tower.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="`embeddings` has NaN or infinite values in 48 of 48"):
        ImageIndex.build(tower, images)


def test_an_unreadable_query_is_named(tower, images, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"Image 0 \(.*cut.png\) can't be read"):
        ImageIndex.build(tower, images).search(tmp_path / "cut.png")


# --- The tower ------------------------------------------------------------------------------------


def test_a_tower_that_is_loaded_again_searches(tower, photos: Path, tmp_path: Path) -> None:
    files = sorted(photos.rglob("*.png"))
    index = ImageIndex.build(tower, files)
    index.save(tmp_path / "index")
    tower.save_pretrained(tmp_path / "tower")
    again = ImageIndex.load(tmp_path / "index", load_tower(tmp_path / "tower"))
    assert again.search(files[2], k=5) == index.search(files[2], k=5)


def test_another_tower_is_refused(tower, images, tmp_path: Path) -> None:
    ImageIndex.build(tower, images).save(tmp_path)
    with pytest.raises(ValueError, match="`tower` is another one than the index was built with"):
        ImageIndex.load(tmp_path, flat_tower())


@pytest.mark.parametrize("searched_before", [False, True])
def test_a_tower_that_was_trained_is_noticed(tower, images, searched_before: bool) -> None:
    index = ImageIndex.build(tower, images)
    if searched_before:
        index.search(images[0][0])
    embeddings = tower(torch.stack([tower.preprocess(Image.fromarray(i)) for i in images[0][:4]]))
    embeddings.square().sum().backward()
    # A fused optimizer changes weights behind the back of their version counters.
    torch.optim.AdamW(tower.parameters(), lr=1e-7, fused=True).step()
    with pytest.raises(ValueError, match=r"or was trained since.*Build the index again"):
        index.search(images[0][0])
    assert len(index.search(rows_of(1, 12)[0])) == 10


def test_the_fingerprint_is_not_computed_for_every_search(tower, images, monkeypatch) -> None:
    index = ImageIndex.build(tower, images)
    index.search(images[0][0])
    monkeypatch.setattr(type(tower), "fingerprint", lambda self: pytest.fail("computed again"))
    index.search(images[0][1])


# --- Saving and loading ---------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tower, photos: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(tower, ImageFolder(photos))
    index.save(tmp_path / "new" / "folder")
    again = ImageIndex.load(tmp_path / "new" / "folder", tower)
    for name in ("class_names", "paths", "fingerprint"):
        assert getattr(again, name) == getattr(index, name)
    assert torch.equal(again.embeddings, index.embeddings)
    assert torch.equal(again.labels, index.labels)
    image = sorted(photos.rglob("*.png"))[4]
    assert again.search(image, k=12) == index.search(image, k=12)
    index.verify()
    again.verify()


def test_hostile_names_and_paths_come_back_as_they_were(tmp_path: Path) -> None:
    fields = {"paths": [HOSTILE, None, "../../etc/passwd"], "class_names": [HOSTILE]}
    index_of(rows_of(3), labels=torch.tensor([0, 0, 7]), **fields).save(tmp_path)
    index = ImageIndex.load(tmp_path)
    index.verify()
    assert {"paths": index.paths, "class_names": index.class_names} == fields
    matches = sorted(index.search(rows_of(1)[0], k=3), key=lambda match: match.index)
    assert [match.class_name for match in matches] == [HOSTILE, HOSTILE, None]


def test_an_index_is_replaced_and_other_files_stay(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "image_index-mine.safetensors").write_text("mine too")
    old = ImageIndex.load(saved)
    index_of(rows_of(4, seed=5)).save(saved)
    assert len(ImageIndex.load(saved)) == 4
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "image_index-mine.safetensors").read_text() == "mine too"
    assert len(list(saved.iterdir())) == 5
    # The old one is still whole in memory, and says that its files are gone.
    torch.testing.assert_close(old.embeddings, rows_of(20).half())
    with pytest.raises(ValueError, match=r"is another one by now. Load it again"):
        old.verify()
    old.save(saved)
    assert len(ImageIndex.load(saved)) == 20


def test_an_open_index_survives_the_deletion_of_its_folder(saved: Path) -> None:
    index = ImageIndex.load(saved)
    shutil.rmtree(saved)
    assert index.search(rows_of(20)[6], k=1)[0].index == 6
    with pytest.raises(FileNotFoundError, match=r"no image_index.json"):
        index.verify()


def test_others_may_read_it_as_they_may_read_any_new_file(saved: Path) -> None:
    (saved / "any").touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {(saved / "any").stat().st_mode}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more ends in an OSError, as on a full disk; Python ignores the signal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("rows", "path_length"), [(4000, 1), (8, 20_000)])
def test_a_full_disk_leaves_the_old_index_and_no_more(
    saved: Path, rows: int, path_length: int
) -> None:
    before = {path: path.read_bytes() for path in saved.iterdir()}
    index = index_of(rows_of(rows), paths=["x" * path_length] * rows)
    with files_of_at_most(100_000), pytest.raises(OSError, match=r"(?i)file too large"):
        index.save(saved)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before


def test_a_kill_before_any_file_operation_leaves_an_index(saved: Path) -> None:
    new, lengths = index_of(rows_of(4)), []
    for left in every_kill(saved, new.save):
        index = ImageIndex.load(left)
        index.verify()
        lengths.append(len(index))
    # At first the old index is left, and from some operation on the new one.
    assert set(lengths) == {20, 4}
    assert lengths == sorted(lengths, reverse=True)


# --- Damage ---------------------------------------------------------------------------------------


def test_a_cut_file_is_refused(saved: Path) -> None:
    path = tensors_file(saved)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"image_index-\w+.safetensors' is damaged: it has \d+ bytes"
    ):
        ImageIndex.load(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing, and embeddings are in it"):
        ImageIndex.load(saved)


def test_a_damaged_header_of_the_tensors_is_refused(saved: Path) -> None:
    path = tensors_file(saved)
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\xff" + content[21:])
    with pytest.raises(ValueError, match="safetensors' is damaged"):
        ImageIndex.load(saved)
    path.write_bytes(content.replace(b'"F16"', b'"I16"'))
    with pytest.raises(ValueError, match=r"its tensors are not those that image_index.json tells"):
        ImageIndex.load(saved)


def test_verify_names_the_file_with_a_flipped_byte(saved: Path) -> None:
    path = tensors_file(saved)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}' is damaged: its checksum differs"):
        ImageIndex.load(saved).verify()


def test_verify_names_a_changed_json(saved: Path) -> None:
    text = (saved / HEADER).read_text()
    (saved / HEADER).write_text(text.replace('"bee"', '"bed"', 1))
    with pytest.raises(ValueError, match=r"image_index.json' is damaged: its checksum differs"):
        ImageIndex.load(saved)
    (saved / HEADER).write_text(json.dumps(json.loads(text), indent=1))
    ImageIndex.load(saved).verify()


def test_an_index_without_files_has_nothing_to_verify() -> None:
    with pytest.raises(ValueError, match="neither saved nor loaded"):
        index_of(rows_of(2)).verify()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": "pairclip.Ima', "not valid JSON"),
        ("[1]", "is no index of pairclip"),
        ('{"name": "site"}', "is no index of pairclip"),
        (
            json.dumps(sealed({"format": "pairclip.ImageIndex", "version": 3})),
            "has format 3, and this version of pairclip reads up to 2. Update pairclip",
        ),
        (
            json.dumps(sealed({"format": "pairclip.ImageIndex"})),
            "its field 'version' is missing or wrong",
        ),
        ('{"format": "pairclip.ImageIndex", "version": 3}', "its checksum differs"),
    ],
)
def test_another_json_is_refused(saved: Path, content: str, message: str) -> None:
    (saved / HEADER).write_text(content)
    with pytest.raises(ValueError, match=message):
        ImageIndex.load(saved)
    index_of(rows_of(2)).save(saved)
    assert len(ImageIndex.load(saved)) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "1"),
        ("fingerprint", None),
        ("num_images", 0),
        ("embedding_dim", True),
        ("dtype", ["float16"]),
        ("dtype", "int8"),
        ("has_labels", 1),
        ("class_names", [1]),
        ("class_names", "ant"),
        ("segments", None),
        ("segments", []),
        ("segments", [3]),
        ("segments", [{"file": "../../../etc/passwd", "bytes": 1, "sha256": "0" * 64}]),
    ],
)
def test_a_wrong_field_is_named(saved: Path, field: str, value: object) -> None:
    header = json.loads((saved / HEADER).read_text())
    (saved / HEADER).write_text(json.dumps(sealed({**header, field: value})))
    with pytest.raises(ValueError, match=f"its field '{field}' is missing or wrong"):
        ImageIndex.load(saved)


@pytest.mark.parametrize("removed", [None, [20], [-1], [True], list(range(20))])
def test_wrong_rows_that_were_removed_are_named(saved: Path, removed: object) -> None:
    header = json.loads((saved / HEADER).read_text())
    header["segments"][0]["removed"] = removed
    (saved / HEADER).write_text(json.dumps(sealed(header)))
    with pytest.raises(ValueError, match="its field 'segments' is missing or wrong"):
        ImageIndex.load(saved)


def test_no_flipped_bit_of_labels_paths_or_json_is_used(saved: Path) -> None:
    expected = ImageIndex.load(saved)
    path, header = tensors_file(saved), (saved / HEADER).read_bytes()
    content = path.read_bytes()
    rows = content.index(_files.bytes_of(expected.embeddings[0]).tobytes())
    for place in {*range(0, len(content), 3)} - {*range(rows, rows + 20 * 24 * 2)}:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            ImageIndex.load(saved)
    path.write_bytes(content)
    for place in range(0, len(header), 3):
        damaged = bytearray(header)
        damaged[place] ^= 1 << place % 8
        (saved / HEADER).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged|is no index"):
            ImageIndex.load(saved)


@pytest.mark.parametrize("paths", ["null", '["0.jpg"]', "[" + 20 * "3, " + "4]", "[" * 100_000])
def test_wrong_paths_under_right_checksums_are_told_when_one_is_asked_for(
    saved: Path, paths: str
) -> None:
    path, header = tensors_file(saved), json.loads((saved / HEADER).read_text())
    tensors = {name: tensor.clone() for name, tensor in _files.MappedTensors(path).items()}
    tensors["paths"] = torch.frombuffer(bytearray(paths, "ascii"), dtype=torch.uint8)
    with path.open("wb") as file:
        _files.write_tensors(file, tensors)
    header["segments"][0] |= {
        "bytes": path.stat().st_size,
        "sha256": _files.checksum(path),
        "details_sha256": _checksum_of({name: tensors[name] for name in ("labels", "paths")}),
    }
    (saved / HEADER).write_text(json.dumps(sealed(header)))
    index = ImageIndex.load(saved)
    index.verify()
    assert index.nearest_neighbors(rows_of(1))[0].shape == (1, 10)
    for asked in (lambda: index.paths, lambda: index.search(rows_of(1))):
        with pytest.raises(ValueError, match=f"{path.name}' is damaged"):
            asked()


# --- Growing and shrinking ------------------------------------------------------------------------


def test_adding_is_building_with_more(tower, photos: Path, tmp_path: Path) -> None:
    dataset = ImageFolder(photos)
    whole = ImageIndex.build(tower, dataset)
    index = ImageIndex.build(tower, Subset(dataset, range(5)))
    index.save(tmp_path / "index")
    index.add(Subset(dataset, range(5, 9)))
    index.add(Subset(dataset, range(9, 12)), batch_size=2)
    queries = rows_of(3, 12)
    for found in (index, saved_again(index, tmp_path / "index", tower)):
        assert len(found) == 12
        assert torch.equal(found.embeddings, whole.embeddings)
        assert torch.equal(found.labels, whole.labels)
        assert (found.paths, found.class_names) == (whole.paths, whole.class_names)
        for result, expected in zip(
            found.nearest_neighbors(queries, 12), whole.nearest_neighbors(queries, 12), strict=True
        ):
            torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def saved_again(index: ImageIndex, folder: Path, tower: Any = None) -> ImageIndex:
    index.save(folder)
    index.verify()
    return ImageIndex.load(folder, tower)


def test_new_classes_are_joined_by_name(tower, images) -> None:
    pictures = images[0][:6]
    index = ImageIndex.build(tower, (pictures[:3], ["cat", "ant", "cat"]))
    index.add((pictures[3:], ["bee", "cat", "bee"]))
    assert index.class_names == ["ant", "cat", "bee"]
    assert index.labels.tolist() == [1, 0, 1, 2, 1, 2]
    with pytest.raises(ValueError, match="`images` must have labels, as the index has them"):
        index.add(pictures)
    with pytest.raises(ValueError, match="must have class names, as the index has them"):
        index.add((pictures[:2], [0, 1]))
    with pytest.raises(ValueError, match="must have no class names, since the index has none"):
        ImageIndex.build(tower, (pictures[:2], [0, 1])).add((pictures[:2], ["a", "b"]))
    plain = ImageIndex.build(tower, pictures)
    with pytest.raises(ValueError, match="must have no labels, since the index has none"):
        plain.add((pictures, [0] * 6))
    with pytest.raises(ValueError, match="loaded without a tower"):
        index_of(rows_of(3)).add(pictures)
    assert len(index) == len(plain) == 6


def test_what_is_removed_is_not_found_and_the_rest_moves_up(tmp_path: Path) -> None:
    rows, labels = rows_of(40), torch.arange(40)
    paths = [str(i) for i in range(40)]
    index = index_of(rows.half(), labels=labels, paths=paths)
    index.save(tmp_path)
    left = [i for i in range(40) if i not in (0, 3, 17, 39)]
    index.remove([3, 0])
    index.remove(torch.tensor([15, 37]))
    for found in (index, saved_again(index, tmp_path), pickle.loads(pickle.dumps(index))):
        assert found.labels.tolist() == left
        assert found.paths == [str(i) for i in left]
        (match,) = found.search(rows[20], k=1)
        assert (match.path, match.label, found.paths[match.index]) == ("20", 20, "20")
        expected = index_of(rows[left].half()).nearest_neighbors(rows[:5], 36)
        assert torch.equal(found.nearest_neighbors(rows[:5], 36)[1], expected[1])
    loaded = ImageIndex.load(tmp_path)
    loaded.remove(range(30))  # most of the file is of no use then
    assert saved_again(loaded, tmp_path).labels.tolist() == left[30:]
    with pytest.raises(ValueError, match=r"`indices` must be in \[0, 6\), got 6"):
        loaded.remove([1, 6])
    with pytest.raises(ValueError, match="`indices` must leave an image in the index"):
        loaded.remove(range(6))
    for wrong in ([0.5], 3, "1", np.arange(6) < 2, torch.ones(6) > 0, [[1]], None):
        with pytest.raises(TypeError, match=r"`indices` must be integers, .*flatnonzero\(mask\)"):
            loaded.remove(wrong)
    loaded.remove([])
    loaded.remove(match.index for match in loaded.search(rows[left[30:33]][0], k=1))
    loaded.remove({0, 1})
    assert loaded.labels.tolist() == left[33:]


def test_saving_after_adding_writes_the_new_rows_alone(tower, images, tmp_path: Path) -> None:
    index = ImageIndex.build(tower, np.repeat(images[0], 8, axis=0))
    index.save(tmp_path)
    first = tensors_file(tmp_path)
    number, time = first.stat().st_ino, first.stat().st_mtime_ns
    for _ in range(20):
        index.add(images[0][:8])
        index.save(tmp_path)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (number, time)
    assert len(list(tmp_path.glob("image_index-*"))) < 8
    again = ImageIndex.load(tmp_path)
    again.verify()
    assert torch.equal(again.embeddings, index.embeddings)
    assert len(again) == 8 * 48 + 160
    # Elsewhere, and where another index is by now, all of it is written.
    index.save(tmp_path / "elsewhere")
    index_of(rows_of(3)).save(tmp_path)
    index.save(tmp_path)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        assert torch.equal(ImageIndex.load(folder).embeddings, index.embeddings)


def test_an_index_of_the_first_format_grows(tower, images, tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "old_files" / "index", tmp_path / "old")
    index = ImageIndex.load(tmp_path / "old")
    index.remove([1])
    again = saved_again(index, tmp_path / "old")
    assert again.paths == ["a.png", "\udcff.png", "d", "e", "f"]
    assert again.labels.tolist() == [0, 2, 0, 1, 2]
    assert len(list((tmp_path / "old").glob("image_index-*"))) == 1


def test_a_kill_while_additions_are_saved_leaves_an_index(saved: Path) -> None:
    index = ImageIndex.load(saved)
    index.remove([19])
    index._segments.append(Segment(rows_of(3).half(), torch.zeros(3).long(), None))
    lengths = []
    for left in every_kill(saved, lambda where: save_as_if_from(index, where)):
        found = ImageIndex.load(left)
        found.verify()
        lengths.append(len(found))
        found.save(left)
        assert len(list(left.iterdir())) == 2 + len(found._segments)
    assert set(lengths) == {20, 22}
    assert lengths == sorted(lengths)


def save_as_if_from(index: ImageIndex, folder: Path) -> None:
    """Save into a copy of the folder that the index was loaded from."""
    assert index._saved is not None
    index._saved = (folder, index._saved[1])
    index.save(folder)


def test_readers_beside_writers_find_an_index(saved: Path) -> None:
    """Threads of one process, which have one process id."""

    def write(seed: int) -> None:
        for _ in range(10):
            index_of(rows_of(3 + seed, seed=seed)).save(saved)

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, seed) for seed in range(4)]
        while not all(writer.done() for writer in writers):
            index = ImageIndex.load(saved)
            if len(index) != 20:
                torch.testing.assert_close(
                    index.embeddings, rows_of(len(index), seed=len(index) - 3)
                )
        for writer in writers:
            writer.result()
    assert len(list(saved.glob("image_index-*"))) == 1
    ImageIndex.load(saved).verify()


def test_a_loaded_index_can_be_pickled(saved: Path) -> None:
    index = pickle.loads(pickle.dumps(ImageIndex.load(saved)))
    assert torch.equal(index.embeddings, rows_of(20).half())
    assert index.search(rows_of(20)[3], k=1) == ImageIndex.load(saved).search(rows_of(20)[3], k=1)


# --- Choosing among what is found -----------------------------------------------------------------


def test_fewer_images_than_k_are_all_found(saved: Path) -> None:
    index = ImageIndex.load(saved)
    assert [len(found) for found in index.search(rows_of(2), k=10**30)] == [20, 20]


def test_a_score_below_which_nothing_matches(saved: Path) -> None:
    index, query = ImageIndex.load(saved), rows_of(20)[4]
    every = index.search(query, k=20)
    for score in (every[3].score, 0.0, 1.5):
        assert index.search(query, k=20, min_score=score) == [m for m in every if m.score >= score]
    with pytest.raises(TypeError, match="`min_score` must be a number"):
        index.search(query, min_score="high")
    with pytest.raises(ValueError, match=r"`min_score` must be in \[-inf, inf\], got nan"):
        index.search(query, min_score=math.nan)


def test_some_classes_alone(saved: Path) -> None:
    index, query = ImageIndex.load(saved), rows_of(20)[4]
    for removed in ([], [0, 5, 6]):
        if removed:
            index.remove(removed)
        every = index.search(query, k=20)
        for names in (["ant"], ["cat", "bee"]):
            expected = [match.index for match in every if match.class_name in names]
            found = index.search(query, k=20, class_names=names)
            assert [match.index for match in found] == expected
            assert index.search(query, k=2, class_names=iter(names)) == found[:2]
    twice = index_of(rows_of(3), labels=torch.arange(3), class_names=["ant", "bee", "ant"])
    assert {match.index for match in twice.search(query, class_names=["ant"])} == {0, 2}
    with pytest.raises(ValueError, match=r"index's classes, got \['dog'\]. They are 'ant', 'b"):
        index.search(query, class_names=["ant", "dog"])
    with pytest.raises(ValueError, match=r"index's classes, got \[\[\]\]. They are"):
        index.search(query, class_names=[[]])
    for wrong in ("ant", 1):
        with pytest.raises(TypeError, match=f"must be a list of names, got {wrong!r}"):
            index.search(query, class_names=wrong)
    with pytest.raises(ValueError, match="this index has no class names"):
        index_of(rows_of(2)).search(query, class_names=["ant"])


def test_autocast_changes_no_score(saved: Path) -> None:
    index = ImageIndex.load(saved)
    expected = index.nearest_neighbors(rows_of(3), k=5)
    with torch.autocast("cpu", torch.bfloat16):
        found = index.nearest_neighbors(rows_of(3), k=5)
    assert torch.equal(found[0], expected[0])


# --- Parquet --------------------------------------------------------------------------------------


def write_parquet(file: Path, fingerprint: str | None = None, /, **columns: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(columns)
    if fingerprint is not None:
        table = table.replace_schema_metadata({"pairclip.fingerprint": fingerprint})
    pyarrow.parquet.write_table(table, file)


@pytest.fixture(autouse=True, scope="module")
def parquet() -> None:
    pytest.importorskip("pyarrow.parquet")


def test_an_index_of_parquet_files(tmp_path: Path) -> None:
    rows = 3 * rows_of(6)
    for number, part in enumerate((slice(0, 4), slice(4, 6))):
        write_parquet(
            tmp_path / f"{number}.parquet",
            "0" * 64,
            vector=rows[part].tolist(),
            path=["a", "b", None, "d", "e", "f"][part],
            label=["cat", "ant", "cat", "ant", "bee", "cat"][part],
        )
    index = ImageIndex.from_parquet(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(index.embeddings, rows_of(6))
    assert index.paths == ["a", "b", None, "d", "e", "f"]
    assert index.class_names == ["ant", "bee", "cat"]
    assert index.labels.tolist() == [2, 0, 2, 0, 1, 2]
    assert index.fingerprint == "0" * 64
    with pytest.raises(ValueError, match="`tower` is another one"):
        ImageIndex.from_parquet(tmp_path, flat_tower())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a"]}, "a.parquet' can't be read: it has no column 'vector', but path"),
        ({"vector": [1.0, 2.0]}, "must have lists of numbers, got double"),
        ({"vector": ["1", "2"]}, "must have lists of numbers, got string"),
        ({"vector": [["1"], ["2"]]}, "must have lists of numbers, got list<.*string>"),
        ({"vector": [[1.0], [1.0, 2.0, 3.0]]}, "has lists of 1 to 3 numbers"),
        ({"vector": [[1.0, 2.0], None]}, "its column 'vector' has missing values"),
        ({"vector": [[1.0, None]]}, "its column 'vector' has missing values"),
        ({"vector": [[1.0, float("nan")]]}, "NaN or infinite values in 1 of the rows 0 to 0"),
        ({"vector": [[1.0, 1e300]]}, "NaN or infinite values"),
        ({"vector": [[1.0]], "path": [3]}, "its column 'path' must have texts, got int64"),
        ({"vector": [[1.0]], "label": [0.5]}, "'label' must have texts or integers, got double"),
        ({"vector": [[1.0], [2.0]], "label": ["a", None]}, "of all rows or of none, and some are"),
        ({"vector": [[1.0], [2.0]], "label": ["a", ""]}, "some are missing"),
        ({"vector": [[1.0], [2.0]], "label": [-1, 0]}, "some are missing"),
    ],
)
def test_parquet_files_that_are_no_index(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        ImageIndex.from_parquet(tmp_path)


@pytest.mark.parametrize("number", ["halffloat", "float", "double", "int8"])
@pytest.mark.parametrize("of", ["list_", "large_list", "fixed"])
def test_vectors_and_labels_of_any_type(tmp_path: Path, number: str, of: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    kind = pyarrow.type_for_alias(number)
    lists = pyarrow.list_(kind, 2) if of == "fixed" else getattr(pyarrow, of)(kind)
    given = np.array([[3, 4], [0, 0], [-5, 12]], kind.to_pandas_dtype())
    names = pyarrow.array(["b", "a", "b"]).dictionary_encode()
    write_parquet(tmp_path / "a.parquet", vector=pyarrow.array([*given], lists), label=names)
    index = ImageIndex.from_parquet(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(
        index.embeddings, nn.functional.normalize(torch.from_numpy(given).float())
    )
    assert (index.labels.tolist(), index.class_names) == ([1, 0, 1], ["a", "b"])
    assert index.paths is None


def test_columns_as_other_libraries_write_them(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    names = ["b", "a", "b"]
    tensors = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(np.eye(3, dtype=np.float32))
    texts = pyarrow.array(names, pyarrow.string_view())
    for paths in (texts, pyarrow.array(names).dictionary_encode()):
        write_parquet(tmp_path / "a.parquet", vector=tensors, label=texts, path=paths)
        index = ImageIndex.from_parquet(tmp_path)
        assert torch.equal(index.embeddings, torch.eye(3).half())
        assert (index.paths, index.class_names) == (names, ["a", "b"])
    with pytest.raises(ValueError, match=r"`tower` is another one .* of 12 numbers, they of 3"):
        ImageIndex.from_parquet(tmp_path, flat_tower())


def test_parquet_files_that_do_not_go_together(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", vector=[[1.0, 0.0]], label=["a"], path=["x"])
    other = tmp_path / "b.parquet"
    for columns, message in (
        ({"vector": [[1.0]], "label": ["a"]}, "have vectors of 1 and 2 numbers"),
        ({"vector": [[1.0, 0.0]]}, "of all rows or of none, and some are missing"),
        ({"vector": [[1.0, 0.0]], "label": [1]}, "must be all texts or all integers, got both"),
    ):
        write_parquet(other, **columns)
        with pytest.raises(ValueError, match=message):
            ImageIndex.from_parquet(tmp_path)
    write_parquet(other, vector=pyarrow.array([], pyarrow.list_(pyarrow.float32())))
    assert ImageIndex.from_parquet(tmp_path).paths == ["x"]
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        other.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b.parquet' can't be read: Parquet"):
            ImageIndex.from_parquet(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    write_parquet(other, vector=pyarrow.array([], pyarrow.list_(pyarrow.float32())))
    with pytest.raises(ValueError, match=r"The files \*.parquet of '.*' have no rows"):
        ImageIndex.from_parquet(tmp_path)


def test_parquet_files_of_several_towers_or_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no files \*.parquet"):
        ImageIndex.from_parquet(tmp_path)
    write_parquet(tmp_path / "a.parquet", "a", vector=[[1.0, 0.0]])
    write_parquet(tmp_path / "b.parquet", "b", vector=[[1.0, 0.0]])
    with pytest.raises(ValueError, match="were made by several towers"):
        ImageIndex.from_parquet(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no image_index.json, so no index was saved"):
        ImageIndex.load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="`folder` must be a folder, got the file"):
        index_of(rows_of(2)).save(tmp_path / "file")
