"""The search example, called within this process."""

import importlib.util
import json
import re
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
        assert example.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    first = search(folder.parent / "query.png", 2)
    assert f"Images in {folder}: 5." in first
    assert "LEFT OUT, because they can't be read: 1 of the images." in first
    assert f"  '{folder}/deep/broken.JPG': cannot identify image file" in first
    assert "index: 4." in first
    assert len(found_in(first)) == 2
    assert f"To look at: {output / 'search.html'}" in first
    html = (output / "search.html").read_text()
    assert all(name.replace("<b>&", "&lt;b&gt;&amp;") in html for name in found_in(first))
    assert "<b>&" not in html

    second = search(folder.parent / "query.png", 2)
    assert "Nothing has changed since they were indexed." in second
    assert "LEFT OUT, because they can't be read: 1 of the images." in second
    assert found_in(second) == found_in(first)

    arguments = [folder, folder.parent / "query.png", "--model", model, "--output", output]
    assert example.main([*map(str, arguments), "-k", "2", "--json"]) == 0
    printed, said = capsys.readouterr()
    (answer,) = json.loads(printed)
    assert [Path(match["path"]).name for match in answer["matches"]] == found_in(first)
    assert "Nothing has changed since they were indexed." in said

    (folder / "deep" / "blue.png").unlink()
    third = search(folder / "red.png", 9)
    assert "Indexing anew, since the saved index can't be used. The images are" in third
    # The query is in the folder, and does not find itself.
    assert sorted(found_in(third)) == ["<b>&.png", "lime.png"]

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
    assert example.main(["--offline", "--output", str(tmp_path)]) == 0
    first, said = capsys.readouterr()
    assert said.startswith("OFFLINE: offline stand-in")
    assert "index: 300." in first
    assert len(found_in(first)) == 12
    assert first.count("/butterfly/") >= 6
    assert example.main(["--offline", "--output", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert "Nothing has changed" in again
    assert found_in(again) == found_in(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "{folder}/none.png"], "QUERY '{folder}/none.png' does not exist"),
        (["{folder}/none", "{folder}/red.png"], "FOLDER '{folder}/none' does not exist"),
        (["{folder}/empty", "{folder}/red.png"], "FOLDER '{folder}/empty' has no images"),
        (["{folder}/broken", "{folder}/red.png"], "None of the images can be read"),
        (["{folder}", "{folder}/red.png", "--model", "./none"], "MODEL './none' does not exist"),
    ],
)
def test_what_can_t_be_done_ends_in_one_line(
    example: ModuleType,
    folder: Path,
    model: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "cut.png").write_bytes(b"")
    output = str(folder.parent / "out")
    filled = [argument.format(folder=folder) for argument in arguments]
    assert example.main(["--model", str(model), "--output", output, *filled]) == 1
    (line,) = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)
    assert message.format(folder=folder) in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder"], "give FOLDER and QUERY, or --offline"),
        (["folder", "query.png", "-k", "0"], "-k: must be at least 1, got 0"),
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
