"""Tables of every kind give the same images, ids and names."""

import gzip
import importlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from pairclip import LabelledImages, TableDataset, evaluate
from pairclip.datasets import tables
from pairclip.towers import random_tower

LABELS = ["dog", "cat", "dog", "ant"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder: Path, kind: str, frame: pandas.DataFrame) -> Any:
    """The frame as a table of this kind."""
    path = folder / f"table.{kind}"
    if kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pandas(frame), path)
    elif kind == "jsonl":
        rows = (row.dropna().to_dict() for _, row in frame.iterrows())
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "pandas":
        return frame.sample(frac=1, random_state=0).sort_values("path")
    else:
        return pa.Table.from_pandas(frame)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "parquet", "jsonl", "pandas", "arrow"])
def test_every_table_gives_the_same(folder: Path, kind: str) -> None:
    frame = pandas.DataFrame({"note": 1.5, "path": [f"{i}.png" for i in range(4)], "name": LABELS})
    table = write(folder, kind, frame)
    root = folder if kind in ("pandas", "arrow") else None
    dataset = TableDataset(table, image="path", label="name", root=root)
    data = LabelledImages(dataset)
    assert data.class_names == ["ant", "cat", "dog"]
    assert data.labels.tolist() == [2, 1, 2, 0]
    assert [image.getpixel((0, 0))[0] for image, _ in data] == [0, 1, 2, 3]
    assert data.source.path(2) == str(folder / "2.png")
    image, label = dataset[3]
    assert (image.getpixel((0, 0)), label, len(dataset)) == ((3, 0, 0), 0, 4)
    with pytest.raises(IndexError, match=r"`index` must be in \[0, 4\)"):
        dataset[4]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "pandas", "arrow"])
def test_labels_may_be_integers(folder: Path, kind: str) -> None:
    frame = pandas.DataFrame({"path": [f"{i}.png" for i in range(4)], "label": [7, 0, -3, 7]})
    table = write(folder, kind, frame)
    data = LabelledImages(TableDataset(table, image="path", label="label", root=folder))
    assert (data.labels.tolist(), data.class_names) == ([7, 0, -3, 7], None)


def test_names_of_digits_stay_names(folder: Path) -> None:
    for values, names in (
        (["007", "7", "010", "8"], ["007", "010", "7", "8"]),
        (["7", "NA", "nan", "8"], ["7", "8", "NA", "nan"]),
        (["1.5", "2", "3", "4"], ["1.5", "2", "3", "4"]),
    ):
        rows = (f"{i}.png,{value}\n" for i, value in enumerate(values))
        (folder / "table.csv").write_text("path,label\n" + "".join(rows))
        dataset = TableDataset(folder / "table.csv", image="path", label="label")
        assert dataset.class_names == names
        assert [names[id_] for id_ in dataset.labels.tolist()] == values


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "pandas", "arrow"])
@pytest.mark.parametrize("labels", [["b", None, "a", "b"], [1, None, 0, 1]])
def test_missing_labels_are_told(folder: Path, kind: str, labels: list[Any]) -> None:
    frame = pandas.DataFrame({"path": [f"{i}.png" for i in range(4)], "label": labels})
    dataset = TableDataset(write(folder, kind, frame), image="path", label="label", root=folder)
    with pytest.raises(ValueError, match="1 of 4 images have no label"):
        LabelledImages(dataset)
    with pytest.warns(UserWarning, match="left out, those at 1"):
        data = LabelledImages(dataset, drop_missing=True)
    assert data.labels.tolist() == [1, 0, 1]


def test_labels_may_be_of_several_columns_and_other_types(folder: Path) -> None:
    frame = pandas.DataFrame({"path": [f"{i}.png" for i in range(4)]})
    frame["kind"], frame["size"] = ["a", "b", "a", None], [1, 1, 2, 2]
    frame["day"] = pandas.to_datetime(["2024-01-02", "2024-01-01", "2024-01-02", "2024-01-02"])
    frame["good"] = [True, False, True, True]
    frame["category"] = pandas.Series(["x", "y", "x", "x"], dtype="category")
    opened = {
        str(label): TableDataset(frame, image="path", label=label, root=folder)
        for label in (["kind", "size"], "day", "good", "category")
    }
    assert opened["['kind', 'size']"].class_names == ["a/1", "a/2", "b/1"]
    assert opened["['kind', 'size']"].labels.tolist() == [0, 2, 1, -1]
    for label in ("day", "good", "category"):
        assert opened[label].labels[0] == opened[label].labels[2] != opened[label].labels[1]
    frame["several"] = [[1, 0], [1, 1], [0, 0], [0, 1]]
    with pytest.raises(ValueError, match="An image of several classes has no class id"):
        TableDataset(frame, image="path", label="several", root=folder)
    frame["mixed"] = [1, "a", 2, "b"]
    with pytest.raises(TypeError, match="all integers or all names, got int, str"):
        TableDataset(frame, image="path", label="mixed", root=folder)


def test_images_may_be_bytes_or_structs_of_hugging_face(folder: Path) -> None:
    encoded = [(folder / f"{i}.png").read_bytes() for i in range(4)]
    structs = [
        {"bytes": None, "path": str(folder / "0.png")},
        {"bytes": encoded[1], "path": "elsewhere.png"},
        {"bytes": encoded[2], "path": None},
        {"bytes": encoded[3], "path": None},
    ]
    for column in (encoded, structs, [folder / f"{i}.png" for i in range(4)]):
        frame = pandas.DataFrame({"image": column, "label": LABELS})
        data = LabelledImages(TableDataset(frame, image="image", label="label"))
        assert [image.getpixel((0, 0))[0] for image, _ in data] == [0, 1, 2, 3]
        identities = [data.source.identity(index) for index in range(4)]
        assert len(set(identities)) == 4
        assert None not in identities
    frame["image"] = [encoded[0], None, encoded[2], encoded[3]]
    data = LabelledImages(TableDataset(frame, image="image", label="label"))
    with pytest.raises(ValueError, match="Image 1 can't be read: there is no image in the row"):
        data[1]


OML = """path,label,split,is_query,is_gallery
0.png,dog,train,,
1.png,cat,validation,True,False
2.png,dog,validation,False,True
3.png,cat,validation,True,True
"""


def test_rows_of_a_split_are_chosen(folder: Path) -> None:
    (folder / "oml.csv").write_text(OML)
    for split, paths in (
        ("train", ["0.png"]),
        ("validation", ["1.png", "2.png", "3.png"]),
        ("is_query", ["1.png", "3.png"]),
        ({"is_gallery": True}, ["2.png", "3.png"]),
        ({"split": "validation", "is_query": False}, ["2.png"]),
    ):
        for table in (folder / "oml.csv", pandas.read_csv(folder / "oml.csv")):
            if split == "is_query" and not isinstance(table, Path):
                continue  # pandas reads booleans with gaps as objects
            dataset = TableDataset(table, image="path", label="label", root=folder, split=split)
            found = [Path(str(dataset.source.path(i))).name for i in range(len(dataset))]
            assert found == paths
    fold = pandas.DataFrame({"path": ["0.png", "1.png"], "label": ["a", "b"], "fold": [1, 2]})
    dataset = TableDataset(fold, image="path", label="label", root=folder, split={"fold": 2})
    assert dataset.class_names == ["b"]
    with pytest.warns(UserWarning, match=r"has a column 'split' with \['train', 'validation'\]"):
        assert len(TableDataset(folder / "oml.csv", image="path", label="label")) == 4


def test_paths_start_beside_the_table_or_in_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "lists").mkdir()
    (folder / "lists" / "list.csv").write_text("path,label\n0.png,a\n")
    monkeypatch.chdir(folder)
    options: dict[str, Any] = {"image": "path", "label": "label"}
    assert TableDataset("lists/list.csv", **options)[0][0].size == (6, 4)
    monkeypatch.chdir(folder / "lists")
    with pytest.raises(FileNotFoundError, match=r"'0\.png', is neither in .* Say with `root=`"):
        TableDataset("list.csv", **options)
    assert TableDataset("list.csv", root=folder, **options)[0][0].size == (6, 4)


def test_integers_that_a_gap_elsewhere_made_floats_are_class_ids(folder: Path) -> None:
    frame = pandas.DataFrame({"path": ["0.png"] * 3, "label": [3, 5, None], "fold": [0, 0, 1]})
    frame.to_parquet(folder / "table.parquet")
    options: dict[str, Any] = {"image": "path", "label": "label"}
    assert TableDataset(folder / "table.parquet", **options).labels.tolist() == [3, 5, -1]
    part = TableDataset(folder / "table.parquet", **options, split={"fold": 0})
    assert (part.labels.tolist(), part.class_names) == ([3, 5], None)
    with pytest.raises(TypeError, match="`labels` must be integers, got float64"):
        TableDataset(frame.assign(label=[0.5, 1, 2]), **options, root=folder)


def test_the_first_row_may_lack_its_image(folder: Path) -> None:
    (folder / "list.csv").write_text("path,label\n,a\n0.png,a\n")
    frame = pandas.DataFrame({"path": [None, folder / "0.png"], "label": ["a", "a"]})
    for table in (folder / "list.csv", frame):
        data = LabelledImages(TableDataset(table, image="path", label="label"))
        assert data[1][0].size == (6, 4)
        with pytest.raises(ValueError, match="Image 0 can't be read: there is no image in the row"):
            data[0]


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        ("oml.csv", {"image": "file"}, ValueError, r"no column 'file', but \['path', 'label'"),
        ("oml.csv", {"label": "class"}, ValueError, "no column 'class'"),
        ("oml.csv", {"split": "val"}, ValueError, r"one of \['train', 'validation'\] in a column"),
        ("oml.csv", {"split": {"fold": 1}}, ValueError, "no column 'fold'"),
        ("oml.csv", {"split": {"split": "x"}}, ValueError, "has no rows for split"),
        ("oml.csv", {"label": []}, TypeError, r"must be names of columns, got 'path' and \[\]"),
        ("oml.csv", {"image": 0}, TypeError, "must be names of columns, got 0 and 'label'"),
        ("empty.csv", {}, ValueError, r"`table` '.*empty\.csv' can't be read: Empty CSV file"),
        ("latin.csv", {}, ValueError, "can't be read: .* invalid UTF8 data. Text must be UTF-8"),
        ("head.csv", {}, ValueError, r"^The table has no rows\.$"),
        (
            {"path": ["0.png"], "label": [0], "fold": [1]},
            {"split": {"fold": [1]}},
            TypeError,
            r"a number for the column 'fold' of int64, got \[1\]",
        ),
        ("missing.csv", {}, FileNotFoundError, "`table` must be a file, got"),
        ("0.png", {}, ValueError, r"must be a file \.csv, .*, got '0\.png'"),
        (7, {}, TypeError, "must be a path, or a table of pandas or pyarrow, got int"),
        ({"path": [1.5], "label": [0]}, {}, TypeError, "must have paths, bytes, or structs"),
    ],
)
def test_wrong_tables_are_errors(
    folder: Path, table: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    (folder / "oml.csv").write_text(OML)
    (folder / "empty.csv").write_text("")
    (folder / "head.csv").write_text("path,label\n")
    (folder / "latin.csv").write_bytes("path,label\n0.png,é\n".encode("latin1"))
    if isinstance(table, str):
        table = folder / table
    elif isinstance(table, dict):
        table = pa.table(table)
    with pytest.raises(error, match=message):
        TableDataset(table, **{"image": "path", "label": "label", **options})


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
def test_what_is_in_a_box_is_the_image(tmp_path: Path, kind: str) -> None:
    values = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    image = Image.fromarray(values).convert("RGB")
    image.save(tmp_path / "0.png")
    frame = pandas.DataFrame(
        {
            "path": ["0.png"] * 4,
            "label": ["a", "a", "b", "b"],
            "x_1": [3, None, -2, 40],
            "x_2": [10, None, 5, 50],
            "y_1": [1, None, 15, 0],
            "y_2": [19, None, 99, 10],
        }
    )
    table = write(tmp_path, kind, frame)
    dataset = TableDataset(table, image="path", label="label", root=tmp_path)
    data = LabelledImages(dataset)
    for index, box in ((0, (3, 1, 10, 19)), (1, (0, 0, 30, 20)), (2, (0, 15, 5, 20))):
        assert data[index][0].tobytes() == dataset[index][0].tobytes()
        assert data[index][0].tobytes() == image.crop(box).tobytes()
    for opened in (data, LabelledImages(Subset(dataset, [0, 1, 2, 3]))):
        assert len({opened.source.identity(index) for index in range(4)}) == 4  # of one file
    with pytest.raises(ValueError, match=r"Image 3 .*its box, x_1 40, .* has nothing of the image"):
        data[3]


def test_columns_beside_are_read_when_they_are_asked_for(folder: Path) -> None:
    (folder / "oml.csv").write_text(
        "path,label,split,is_query,is_gallery,category,sequence\n"
        "0.png,1,train,,,bird,s0\n1.png,2,validation,True,True,bird,s1\n"
        "2.png,2,validation,True,True,bird,s1\n3.png,2,validation,True,True,bird,s2\n"
    )
    options: dict[str, Any] = {"image": "path", "label": "label"}
    dataset = TableDataset(folder / "oml.csv", split="validation", **options)
    assert dataset.column("sequence") == ["s1", "s1", "s2"]
    assert dataset.column("category") == ["bird"] * 3
    assert dataset.column("camera") is None
    tower = random_tower()
    plain = evaluate(tower, dataset)
    apart = evaluate(tower, Subset(dataset, [2, 0, 1]), exclude="sequence")
    assert (plain.num_queries, apart.num_queries) == (3, 3)
    assert apart.mean_average_precision == 1  # what is found is never of the same sequence
    with pytest.raises(ValueError, match="`queries`, which has none called 'camera'"):
        evaluate(tower, dataset, exclude="camera")


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "pairclip\[tables\]"'):
        tables.TableDataset("a.csv", image="path", label="label")


def test_a_large_table_opens_quickly_and_small(tmp_path: Path) -> None:
    """A hundred thousand rows, a tenth of what is promised to take 3 s and 300 MB."""
    count = 100_000
    frame = pandas.DataFrame({"number": np.arange(count)})
    frame["path"] = [f"images/{number:07}.jpg" for number in frame.number]
    frame["label"] = [f"class_{number % 997}" for number in frame.number]
    frame.to_csv(tmp_path / "large.csv", index=False)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    dataset = TableDataset(tmp_path / "large.csv", image="path", label="label", root=tmp_path)
    assert time.perf_counter() - start < 3  # a loaded machine
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 60
    assert dataset.class_names == sorted(f"class_{i}" for i in range(997))
    assert dataset.source.path(count - 1) == str(tmp_path / f"images/{count - 1:07}.jpg")
    assert dataset.labels.unique().equal(torch.arange(997))
