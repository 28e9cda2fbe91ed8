"""The search example: once run as a user runs it, else called within this process."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from pairclip import VisionTower

EXAMPLE = Path(__file__).parents[1] / "examples" / "image_search.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("image_search", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four colours at three depths, a broken image and a text."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    for place, color in [(".", "red"), ("deep", "blue"), ("deep/er", "lime"), (".", "<b>&")]:
        image = Image.new("RGB", (20, 20), color if color.isalpha() else "black")
        image.save(folder / place / f"{color}.png")
    (folder / "deep" / "broken.JPG").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    Image.new("RGB", (30, 30), (250, 5, 5)).save(tmp_path / "query.png")
    return folder


@pytest.fixture
def model(tower: VisionTower, tmp_path: Path) -> Path:
    tower.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def found_in(printed: str) -> list[str]:
    """Names of the files in the numbered lines."""
    return [
        Path(path).name for path in re.findall(r"^ *\d+\.  \S+  '(.*)'$", printed, re.MULTILINE)
    ]


def test_a_folder_is_indexed_searched_and_the_index_used_again(
    example: ModuleType, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "out"

    def search(query: Path, k: int) -> str:
        arguments = [folder, query, "--model", model, "--output", output, "-k", k]
        example.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    first = search(folder.parent / "query.png", 2)
    assert f"5 images in {folder}, 1 other files ignored." in first
    assert "LEFT OUT: 1 images can't be read." in first
    assert f"  '{folder}/deep/broken.JPG': cannot identify image file" in first
    assert "Indexing 4 images." in first
    assert len(found_in(first)) == 2
    assert f"To look at: {output / 'search.html'}" in first
    html = (output / "search.html").read_text()
    assert all(name.replace("<b>&", "&lt;b&gt;&amp;") in html for name in found_in(first))
    assert "<b>&" not in html

    second = search(folder.parent / "query.png", 2)
    assert "Using the index of 4 images" in second
    assert "LEFT OUT: 1 images can't be read." in second
    assert "Indexing" not in second
    assert found_in(second) == found_in(first)

    (folder / "deep" / "blue.png").unlink()
    third = search(folder / "red.png", 9)
    assert "Indexing anew, since the saved index can't be used. The images in" in third
    # The query is in the folder, and does not find itself.
    assert sorted(found_in(third)) == ["<b>&.png", "lime.png"]
    assert "no more than these 2 images" in third

    (folder / "link.png").symlink_to(folder / "red.png")
    assert sorted(found_in(search(folder / "link.png", 9))) == ["<b>&.png", "lime.png"]

    (output / "index" / "image_index.json").write_text("damaged")
    assert "is damaged: it is not valid JSON" in search(folder / "red.png", 9)
    for content in ("damaged", "{}", "[]"):
        (output / "index" / "contents.json").write_text(content)
        assert "Indexing anew" in search(folder / "red.png", 9)


def test_another_tower_indexes_anew(
    example: ModuleType,
    folder: Path,
    model: Path,
    tower: VisionTower,
    capsys: pytest.CaptureFixture[str],
) -> None:
    query, output = folder.parent / "query.png", folder.parent / "out"
    arguments = [str(folder), str(query), "--model", str(model), "--output", str(output)]
    example.main(arguments)
    next(tower.parameters()).data.mul_(2)
    tower.save_pretrained(model)
    capsys.readouterr()
    example.main(arguments)
    assert "`tower` is another one than the index was built with" in capsys.readouterr().out


def test_offline_needs_no_network_and_says_so(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--offline", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("OFFLINE: offline stand-in")
    assert "Indexing 300 images." in done.stdout
    assert len(found_in(done.stdout)) == 12
    assert "OFFLINE: offline stand-in" in (tmp_path / "search.html").read_text()
    example.main(["--offline", "--output", str(tmp_path)])
    again = capsys.readouterr().out
    assert "Using the index of 300 images" in again
    assert found_in(again) == found_in(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "{folder}/none.png"], r"none.png\) can't be read: \[Errno 2\]"),
        (["{folder}/none", "{folder}/red.png"], "FOLDER must be a folder of images, got '.*none'"),
        (["{folder}/empty", "{folder}/red.png"], r"empty has no images \(.jpg"),
        (["{folder}/broken", "{folder}/red.png"], "broken has no image that can be read"),
        (["{folder}/deep/er", "{folder}/deep/er/lime.png"], "er has no image but the query"),
        (["{folder}", "{folder}/red.png", "--model", "./none"], "Without a network, use --model"),
    ],
)
def test_what_can_t_be_done_ends_in_one_line(
    example: ModuleType, folder: Path, model: Path, arguments: list[str], message: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "cut.png").write_bytes(b"")
    output = str(folder.parent / "out")
    filled = [argument.format(folder=folder) for argument in arguments]
    with pytest.raises(SystemExit, match=rf"^error: (.|\n)*{message}"):
        example.main(["--model", str(model), "--output", output, *filled])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder"], "give FOLDER and QUERY, or --offline"),
        (["folder", "query.png", "-k", "0"], "-k must be at least 1, got 0"),
        (["folder", "query.png", "--offline"], "leave out FOLDER and QUERY"),
        (["--model", "folder", "--offline"], "leave out --model"),
    ],
)
def test_wrong_arguments_are_refused(
    example: ModuleType,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert message in capsys.readouterr().err
