"""Faults that are planted into a collection are found, whatever it is stored in."""

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pairclip import TableDataset, check_collection
from pairclip.collection import Check
from pairclip.towers import random_tower


class Relative:
    """Tells names of files as they are within a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = [("0.png", 0), ("1.png", 1)]
        self.targets = [0, 1]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.folder / self.samples[index][0]) as image:
            return image.copy(), self.targets[index]


def test_names_that_are_no_paths_are_not_opened_nor_written(tmp_path: Path) -> None:
    for number in range(2):
        picture(np.random.default_rng(number)).save(tmp_path / f"{number}.png")
    check = check_collection({"all": Relative(tmp_path)})
    assert [item.name for item in check.items] == ["0.png", "1.png"]
    with pytest.raises(ValueError, match=r"a table of paths, and 0\.png is no file"):
        check.write_clean(tmp_path / "clean.csv")


def picture(generator: np.random.Generator, side: int = 20) -> Image.Image:
    pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of three classes, and 26 faults of 12 kinds."""
    root = tmp_path_factory.mktemp("collection")
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name in ("ant", "bee", "cat"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture(generator).save(root / part / name / f"{i}.png")
    train, test = root / "train", root / "test"

    def copy(source: Path, target: Path, **change: int) -> None:
        with Image.open(source) as image:
            image.resize((change.get("side", 20),) * 2).save(target, quality=95)

    (train / "ant" / "cut.png").write_bytes((train / "ant" / "0.png").read_bytes()[:200])
    (train / "ant" / "empty.jpg").write_bytes(b"")
    (test / "bee" / "text.jpg").write_text("no image")
    copy(train / "bee" / "1.png", train / "cat" / "as-cat.png")
    copy(train / "ant" / "1.png", test / "bee" / "as-bee.jpg", side=60)
    copy(train / "ant" / "3.png", test / "ant" / "leak.png")
    copy(train / "cat" / "3.png", test / "cat" / "leak.jpg", side=40)
    copy(train / "cat" / "2.png", train / "cat" / "twice.png")
    copy(test / "bee" / "2.png", test / "bee" / "larger.png", side=90)
    for part, name, colour in ((train, "ant", "blue"), (test, "bee", "red")):
        picture(generator).resize((400, 20)).save(part / name / "long.png")
        picture(generator, 9).save(part / name / "tiny.png")
        Image.new("RGB", (30, 30), colour).save(part / name / "flat.png")
        frames = [picture(generator) for _ in range(3)]
        frames[0].save(part / name / "moves.gif", save_all=True, append_images=frames[1:])
    picture(generator).convert("CMYK").save(train / "ant" / "print.jpg")
    picture(generator).convert("P").save(train / "bee" / "palette.png")
    for name in ("dog", "elk"):
        (train / name).mkdir()
        picture(generator).save(train / name / "alone.png")
    for part in (train, test):
        (part / "Ant ").mkdir()
        for i in range(2):
            picture(generator).save(part / "Ant " / f"{i}.png")
    return root


EXPECTED = {
    "Images that can't be read": ["cut.png", "empty.jpg", "text.jpg"],
    "The same image in different classes": ["1.png", "1.png", "as-bee.jpg", "as-cat.png"],
    "The same image in train and test": ["3.png", "3.png", "leak.jpg", "leak.png"],
    "Copies within a part": ["2.png", "2.png", "larger.png", "twice.png"],
    "Very long images": ["long.png", "long.png"],
    "Tiny images": ["tiny.png", "tiny.png"],
    "Images of one colour": ["flat.png", "flat.png"],
    "Files of several images": ["moves.gif", "moves.gif"],
    "Classes of one image": ["alone.png", "alone.png"],
}


def names(check: Check, kind: str) -> list[str]:
    places = [place for finding in check.findings[kind] for place in finding.items]
    return sorted(Path(check.items[place].name).name for place in places)


def assert_all_found(check: Check) -> None:
    assert {kind: names(check, kind) for kind in EXPECTED} == EXPECTED
    assert {"print.jpg", "palette.png"} <= {*names(check, "Images of unusual modes")}
    (alike,) = check.findings["Classes of nearly the same name"]
    assert alike.detail == "'Ant ', 'ant'"
    alone = {finding.detail for finding in check.findings["Classes that are in one part alone"]}
    assert alone == {"dog is not in test", "elk is not in test"}


def test_every_planted_fault_of_a_folder_is_found(folder: Path, tmp_path: Path) -> None:
    check = check_collection({part: folder / part for part in ("train", "test")}, random_tower())
    assert_all_found(check)
    assert not np.isnan(check.suspicion).any(where=[not each.problem for each in check.items])
    assert check.write_clean(tmp_path / "clean.csv") == len(check.items) - 3 - 4 - 2 - 2
    rows = list(csv.DictReader((tmp_path / "clean.csv").read_text().splitlines()))
    left = {(row["split"], Path(row["image"]).name) for row in rows if row["label"] != "Ant "}
    assert ("test", "leak.png") in left
    assert not {each for _, each in left} & {"as-cat.png", "as-bee.jpg", "cut.png", "empty.jpg"}
    assert ("train", "twice.png") not in left
    again = check_collection(
        {
            part: TableDataset(tmp_path / "clean.csv", image="image", label="label", split=part)
            for part in ("train", "test")
        }
    )
    assert not {*again.findings} & {*list(EXPECTED)[:4]}


@pytest.mark.parametrize("kind", ["csv", "parquet", "bytes.parquet"])
def test_every_planted_fault_of_a_table_is_found(kind: str, folder: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = {
        "image": [path.read_bytes() if "bytes" in kind else str(path) for path in paths],
        "label": [path.parent.name for path in paths],
        "split": [path.parent.parent.name for path in paths],
    }
    table = tmp_path / f"images.{kind}"
    if kind == "csv":
        text = io.StringIO()
        csv.writer(text).writerows([[*rows], *zip(*rows.values(), strict=True)])
        table.write_text(text.getvalue())
    else:
        pq.write_table(pa.table(rows), table)
    check = check_collection(
        {
            part: TableDataset(table, image="image", label="label", split=part)
            for part in ("train", "test")
        }
    )
    if kind != "bytes.parquet":
        assert_all_found(check)
        return
    assert {kind: len(found) for kind, found in check.findings.items() if kind in EXPECTED} == {
        "Images that can't be read": 3,
        "The same image in different classes": 2,
        "The same image in train and test": 2,
        "Copies within a part": 2,
        "Very long images": 2,
        "Tiny images": 2,
        "Images of one colour": 2,
        "Classes of one image": 2,
    }  # the kinds of a file's own, such as its frames, need a file
    with pytest.raises(ValueError, match="would be a table of paths, and train image"):
        check.write_clean(tmp_path / "clean.csv")


def test_a_collection_without_faults_says_so() -> None:
    generator = np.random.default_rng(0)
    images = [picture(generator) for _ in range(4)]
    check = check_collection({"all": (images, [0, 0, 1, 1])})
    assert check.to_text() == (
        "all: 4 images, 2 of each of 2 classes.\nShorter sides of 20 pixels; modes: 4 RGB."
        "\n\n"
        "Nothing to look at."
    )
    with pytest.raises(ValueError, match="`parts` must have at least one dataset"):
        check_collection({})
    with pytest.raises(TypeError, match="`parts` must be a dict of datasets by name, got list"):
        check_collection([(images, [0, 0, 1, 1])])  # type: ignore[arg-type]
