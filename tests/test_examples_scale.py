"""The examples for more images than one machine holds, with two workers and a database."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from test_examples import EXAMPLES, opened
from torch.nn.functional import normalize

from pairclip import ImageIndex, VisionTower, embed_images
from pairclip.towers import random_tower

# Ray and LanceDB warn of what they call themselves.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning")
COUNT = 50


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / ["bee", "ant's"][number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (20 + number % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return random_tower()


@pytest.fixture(scope="module")
def model(tower: VisionTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tower"
    tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_ray(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    ray = pytest.importorskip("ray")
    # Its sockets need a short path, and it writes beside them.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    monkeypatch_module.setenv("RAY_AUTH_MODE", "disabled")  # else a token in the home folder
    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=1,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield opened(EXAMPLES / "embed_with_ray.py")
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)  # Ray may still be writing its logs


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_ray_embeds_each_image_once_whatever_stopped_it(
    with_ray: ModuleType,
    photos: Path,
    tower: VisionTower,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = sorted(photos.rglob("*.png"))
    expected = embed_images(tower, files)
    output = tmp_path / "embedded"
    options = ["--output", str(output), "--model", str(model), "--shard", "8", "--towers", "2"]
    # What a killed run leaves: whole files, and one that isn't.
    args = with_ray.parse([str(photos), *options])
    plan = with_ray.shards_of(with_ray.tables(args), args)
    shards = with_ray.Shards(args, tower.fingerprint())
    for shard in plan[:4]:
        first = shard["first"]
        shards.write(shard, expected[first : first + shard["count"]].numpy())
    before = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    left = output / f".part-000004.parquet.{'0' * 32}"
    left.write_bytes(b"PAR1")
    os.utime(left, (0, 0))

    assert with_ray.main([str(photos), *options]) == 0
    assert f"{COUNT} images in 7 shards, 4 of them there." in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not left.exists()
    index = ImageIndex.from_parquet(output, tower, dtype=torch.float32)
    assert index.paths == [str(path) for path in files]
    assert index.class_names == ["ant's", "bee"]
    assert [index.class_names[label] for label in index.labels.tolist()] == [
        path.parent.name for path in files
    ]
    torch.testing.assert_close(index.embeddings, normalize(expected), atol=1e-6, rtol=0)

    assert with_ray.main([str(photos), *options]) == 0  # nothing to do
    assert with_ray.main([str(photos), *options, "--shard", "9"]) == 1
    assert "part-000000.parquet' was made by another tower, or of" in capsys.readouterr().err
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            cause = ValueError("Image 3 can't be read")
            raise with_ray.ray.exceptions.RayTaskError("read", "its traceback", cause)

        patch.setattr(with_ray, "collect", fail)
        (output / "part-000006.parquet").unlink()
        assert with_ray.main([str(photos), *options]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line == "error: A worker failed: Image 3 can't be read"
    files[0].rename(tmp_path / "elsewhere.png")
    assert with_ray.main([str(photos), *options]) == 1
    assert "has other images or labels than when" in capsys.readouterr().err
    (tmp_path / "elsewhere.png").rename(files[0])


def test_tables_are_read_in_parts_that_row_groups_do_not_bound(
    photos: Path, tower: VisionTower, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    example = opened(EXAMPLES / "embed_with_ray.py")
    files = sorted(photos.rglob("*.png"))
    structs = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    names = [path.parent.name for path in files]
    encoded = tmp_path / "encoded"
    encoded.mkdir()
    for part in (slice(0, 20), slice(20, COUNT)):
        table = pa.table({"photo": structs[part], "class": names[part]})
        parquet.write_table(table, encoded / f"{part.start}.parquet", row_group_size=7)
    listed = tmp_path / "images.csv"
    rows = [f"{path.relative_to(photos)},{name}\n" for path, name in zip(files, names, strict=True)]
    listed.write_text("photo,class\n" + "".join(rows))
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    expected = torch.stack([tower.preprocess(Image.open(path)) for path in files])
    for source in (encoded, listed):
        options = ["--image", "photo", "--label", "class", "--shard", "9", "--batch-size", "4"]
        args = example.parse([str(source), "--output", str(tmp_path / "out"), *options])
        shards = example.shards_of(example.tables(args), args)
        assert sum(shard["count"] for shard in shards) == COUNT
        pixels = []
        for shard in shards:
            batch = {name: np.array([value]) for name, value in shard.items()}
            pixels += [part["pixels"] for part in example.read(batch, args, tower.preprocess)]
            labels = example.rows_of(shard, [args.label])[args.label].to_pylist()
            first = sum(s["count"] for s in shards[: shard["number"]])
            assert labels == names[first : first + shard["count"]]
        assert max(map(len, pixels)) == 4
        assert np.array_equal(np.concatenate(pixels), expected.numpy())
    files[0].write_bytes(b"no image")
    args = example.parse([str(photos), "--output", str(tmp_path / "damaged")])
    (shard,) = example.shards_of(example.tables(args), args)
    batch = {name: np.array([value]) for name, value in shard.items()}
    with pytest.raises(ValueError, match=rf"\({re.escape(str(files[0]))}\) can't be read"):
        next(example.read(batch, args, tower.preprocess))
    files[0].write_bytes(structs[0]["bytes"])


def test_tables_that_are_none(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    example = opened(EXAMPLES / "embed_with_ray.py")
    (tmp_path / "empty").mkdir()
    parquet.write_table(pa.table({"file": ["a"]}), tmp_path / "names.parquet")
    parquet.write_table(pa.table({"path": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    for name, options, error, message in (
        ("missing", [], FileNotFoundError, "there is no such file"),
        ("empty", [], ValueError, "empty' has no images"),
        ("none.parquet", [], ValueError, "none.parquet' has no images"),
        ("half.parquet", [], ValueError, "half.parquet' can't be read: "),
        ("names.parquet", [], ValueError, r"--image 'path' is no column of .* has \['file'\]"),
        ("names.parquet", ["--image", "file", "--label", "kind"], ValueError, "--label 'kind' is"),
    ):
        place = [str(tmp_path / name), "--output", str(tmp_path / "out")]
        args = example.parse([*place, *options])
        with pytest.raises(error, match=message):
            example.shards_of(example.tables(args), args)
    assert not (tmp_path / "out").exists()


def test_lancedb_finds_what_the_exact_index_finds(
    photos: Path,
    tower: VisionTower,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lancedb = pytest.importorskip("lancedb")
    example = opened(EXAMPLES / "search_with_lancedb.py")
    files = sorted(photos.rglob("*.png"))
    names = [path.parent.name for path in files]
    vectors = embed_images(tower, files).numpy()
    fingerprint = {"pairclip.fingerprint": tower.fingerprint()}
    for start in range(0, COUNT, 20):
        part = slice(start, start + 20)
        columns = {"path": list(map(str, files[part])), "label": names[part]}
        table = pa.table({**columns, "vector": list(vectors[part])})
        file = tmp_path / "embedded" / f"part-{start:06}.parquet"
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(table.replace_schema_metadata(fingerprint), file)
    index = ImageIndex.from_parquet(file.parent, tower, dtype=torch.float32)

    # One that was killed when it had put in the first file.
    last = file.rename(tmp_path / "last.parquet")
    database = lancedb.connect(tmp_path / "vectors")
    assert example.fill(database, file.parent, tower).count_rows() == 40
    last.rename(file)
    places = ["--database", str(tmp_path / "vectors"), "--model", str(model)]
    options = ["--parquet", str(file.parent), "--label", "ant's", "-k", "3"]
    assert example.main([str(files[0]), *places, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["1.000", str(files[0])]
    assert [line.split()[2] for line in lines] == ["ant's"] * 3

    table = database.open_table("images")
    for query in (3, 30):
        found = example.search(table, vectors[query], 5)
        expected = index.search(vectors[query], k=5)
        assert [row["path"] for row in found] == [match.path for match in expected]
        assert [row["label"] for row in found] == [match.class_name for match in expected]
        assert [row["score"] for row in found] == pytest.approx(
            [m.score for m in expected], abs=1e-5
        )

    other = tmp_path / "other"
    random_tower(seed=1).save_pretrained(other)
    assert example.main([str(files[0]), *places[:2], "--model", str(other)]) == 1
    assert "--model is another tower than that of the vectors" in capsys.readouterr().err
    file.unlink()
    assert example.main([str(files[0]), *places, *options[:2]]) == 1
    assert "has 50 images, which are not the first of the 40" in capsys.readouterr().err


def test_lancedb_searches_by_cells_and_says_what_it_cannot_take(
    tower: VisionTower, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lancedb = pytest.importorskip("lancedb")
    example = opened(EXAMPLES / "search_with_lancedb.py")
    vectors = np.random.default_rng(0).normal(size=(1100, tower.embedding_dim)).astype(np.float32)
    folder = tmp_path / "vectors"
    folder.mkdir()
    # Of no tower that is known, and with numbers as labels.
    columns = {"vector": [*vectors], "label": [row % 3 for row in range(1100)]}
    parquet.write_table(pa.table(columns), folder / "0.parquet")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    args = [str(tmp_path / "red.png"), "--model", str(model), "--database", str(tmp_path / "data")]
    assert example.main(args) == 1
    assert "has no images: give --parquet too" in capsys.readouterr().err
    assert example.main([*args, "--parquet", str(folder), "--cells", "4", "--label", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["0"] * 10
    assert example.main([*args, "--label", "9"]) == 1
    assert "--label '9' is that of no image in the database" in capsys.readouterr().err

    table = lancedb.connect(tmp_path / "data").open_table("images")
    (config,) = table.list_indices()
    assert config.index_type == "IvfPq"
    exact = np.argsort(-vectors @ vectors[7] / np.linalg.norm(vectors, axis=1))[:3]
    labels = [int(row) % 3 for row in exact]
    assert [row["label"] for row in example.search(table, vectors[7], 3)] == labels
    # Looking at the first cell alone finds less than all four have.
    few = example.search(table, vectors[7], 1100, probes=1)
    assert 0 < len(few) < 1100

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for content, message in (
        ({"number": [1]}, "it has no column 'vector', but number"),
        ({"vector": pa.array([], pa.list_(pa.float32()))}, "it has no rows"),
        ({"vector": [[1.0, 2.0], [1.0]]}, "ListType can only be casted to FixedSizeListType"),
    ):
        parquet.write_table(pa.table(content), wrong / "0.parquet")
        assert example.main([*args[:3], "--database", str(wrong), "--parquet", str(wrong)]) == 1
        assert f"0.parquet' can't be put into the database: {message}" in capsys.readouterr().err
