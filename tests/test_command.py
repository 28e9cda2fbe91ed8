"""The `pairclip` command, called within this process."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionModelWithProjection

import pairclip
from pairclip.command import main
from pairclip.command.running import obey, parser
from pairclip.evaluation import Change
from pairclip.recipes import RecipeComparison, RecipeResult
from pairclip.towers import random_tower


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tower"
    random_tower().save_pretrained(folder)
    return folder


def picture(color: int, generator: np.random.Generator) -> Image.Image:
    pixels = generator.integers(0, 90, (5, 5, 3), dtype=np.uint8)
    pixels[..., color] += 150
    return Image.fromarray(pixels).resize((20, 20))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of ten images."""
    generator = np.random.default_rng(0)
    for color, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            picture(color, generator).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_tune_preserves_and_blends_by_default(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, blends = [], []
    fit, interpolate = pairclip.Finetuner.fit, pairclip.interpolate

    def fit_and_tell(self: pairclip.Finetuner, *data: object, **options: object) -> object:
        losses.append((str(self.loss), len(options.get("keep", ()))))
        return fit(self, *data, **options)

    def blend(base: object, tuned: object, alpha: float) -> object:
        blends.append(alpha)
        return interpolate(base, tuned, alpha)

    monkeypatch.setattr(pairclip.Finetuner, "fit", fit_and_tell)
    monkeypatch.setattr(pairclip, "interpolate", blend)
    tune = ("tune", folder, "--model", model, "--batch-size", 8, "--max-steps", 1)
    assert run(*tune, "--output", tmp_path / "default", "--keep", folder / "cat") == 0
    assert run(*tune, "--output", tmp_path / "plain", "--recipe", "plain") == 0
    (preserving, kept), (plain, none) = losses
    assert "weight=0.15, what='embeddings'" in preserving
    assert "weight=0.35, what='similarities'" in preserving
    assert "weight" not in plain
    assert (kept, none, blends) == (10, 0, [0.8])


@pytest.mark.parametrize("worth_it", [True, False])
def test_tune_compares_recipes_first_and_may_leave_the_tower(
    worth_it: bool, folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = pairclip.Recipe("brief", steps=1, batch_size=8, learning_rate=1e-4, blend=0.5)
    change = Change(0.5, 0.75, (0.2, 0.3)) if worth_it else Change(0.5, 0.5, (-0.1, 0.1))
    changes = dict.fromkeys(("recall_at_1", "mean_average_precision"), change)
    result = RecipeResult(recipe, 1, True, changes, {"classes left out": changes})
    monkeypatch.setattr(
        pairclip, "compare_recipes", lambda *_, **__: RecipeComparison([result], limit=0.01)
    )
    output = tmp_path / "out"
    assert run("tune", folder, "--model", model, "--output", output, "--compare") == 0
    assert (output / "recipes.json").is_file()
    assert (output / "tower").is_dir() == worth_it
    if worth_it:
        steps = pairclip.History.from_json(output / "history.json").steps
        assert len(steps) == 1


def test_tune_writes_a_tower_numbers_a_page_and_pictures(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = (
        "--batch-size",
        8,
        "--epochs",
        1,
        "--test-fraction",
        0.4,
        "--hold-out-classes",
        "cat",
    )
    tune = ("tune", folder, "--model", model, "--output", output, *options)
    assert run(*tune, "--json") == 0
    printed, said = capsys.readouterr()
    metrics = json.loads(printed)
    assert metrics["after"]["class_names"] == ["ant", "bee"]
    assert metrics["before"]["also"]["classes that were not trained on"]["class_names"] == ["cat"]
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert "12 images to train on, 8 to evaluate on: 40% of each class held out" in said
    assert "| Recall at 1 |" in said
    CLIPVisionModelWithProjection.from_pretrained(output / "tower")
    made = json.loads((output / "run.json").read_text())
    assert made["arguments"]["batch_size"] == 8
    assert made["data"]["train"]["images"] == 12
    assert made["versions"]["torch"]
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    assert len(modes) == 1
    for name in ("history.png", "similarity_after.png", "class_similarity_before.png"):
        with Image.open(output / name) as drawn:
            assert min(drawn.size) > 300

    assert run(*tune) == 1
    assert "holds another run of 20" in capsys.readouterr().err
    (output / "mine.txt").write_text("stays")
    assert run(*tune, "--overwrite") == 0
    assert (output / "mine.txt").exists()


def test_ctrl_c_is_one_line_and_resume_continues(
    folder: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    options = ("--batch-size", 8, "--max-steps", 2, "--output", tmp_path / "out", "--resume")
    with monkeypatch.context() as patched:
        patched.setattr(pairclip.Finetuner, "fit", stop)
        assert run("tune", folder, "--model", model, *options) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "Interrupted. The same command continues from the last checkpoint."
    assert run("tune", folder, "--model", model, *options) == 0
    assert (tmp_path / "out" / "checkpoints" / "step-00000002").is_dir()


def test_evaluate_alone_and_against_another_tower(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", model, folder) == 0
    assert "| Recall at 1 | " in capsys.readouterr().out
    output = tmp_path / "out"
    assert run("evaluate", model, folder, "--against", model, "--output", output, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["before"]["recall_at_1"] == metrics["after"]["recall_at_1"]
    assert "Two towers compared" in (output / "report.html").read_text()


def test_index_and_search(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ant" / "broken.jpg").write_bytes(b"no image")
    index = tmp_path / "index"
    assert run("index", model, folder, "--output", index) == 0
    said = capsys.readouterr().out
    assert "LEFT OUT: 1 images can't be read." in said
    assert f"30 images are in the index {index}." in said
    assert run("index", model, folder, "--output", index, "--json") == 0
    again = capsys.readouterr()
    assert "Nothing has changed" in again.err
    assert list(json.loads(again.out)["unreadable"]) == [str(folder / "ant" / "broken.jpg")]

    queries = (folder / "ant" / "3.png", folder / "bee" / "4.png")
    page = tmp_path / "page"
    assert run("search", index, *queries, "-k", 3, "--html", page, "--json") == 0
    answers = json.loads(capsys.readouterr().out)
    assert [len(answer["matches"]) for answer in answers] == [3, 3]
    assert str(queries[0]) not in [match["path"] for match in answers[0]["matches"]]
    html = (page / "search.html").read_text()
    assert 'href="../data/ant/3.png"' in html
    assert str(model) in html
    assert run("search", index, queries[0], "--min-score", 1) == 0
    assert "Nothing." in capsys.readouterr().out


def test_check_finds_planted_faults(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(1)
    train, test = tmp_path / "all" / "train", tmp_path / "all" / "test"
    (tmp_path / "all").mkdir()
    folder.rename(train)
    for color, name in enumerate(["ant", "bee"]):
        (test / name).mkdir(parents=True)
        for i in range(3):
            picture(color, generator).save(test / name / f"{i}.png")
    (train / "ant" / "cut.png").write_bytes((train / "ant" / "0.png").read_bytes()[:200])
    with Image.open(train / "bee" / "1.png") as image:
        image.resize((60, 60)).save(train / "bee" / "copy.jpg", quality=95)
        image.save(train / "cat" / "also.png")
    with Image.open(train / "cat" / "2.png") as image:
        image.save(train / "cat" / "twice.png")
    with Image.open(train / "ant" / "3.png") as image:
        image.save(test / "ant" / "leak.png")
    picture(0, generator).resize((400, 20)).save(train / "ant" / "long.png")
    picture(0, generator).resize((9, 9)).save(train / "ant" / "tiny.png")
    picture(0, generator).convert("CMYK").save(train / "ant" / "print.jpg")
    Image.new("RGB", (30, 30), "blue").save(train / "cat" / "flat.png")
    (train / "dog").mkdir()
    picture(1, generator).save(train / "dog" / "one.png")
    (train / "Ant ").mkdir()
    for i in range(2):
        picture(0, generator).save(train / "Ant " / f"{i}.png")
    frames = [picture(2, generator) for _ in range(3)]
    frames[0].save(train / "cat" / "moves.webp", save_all=True, append_images=frames[1:])

    clean, output = tmp_path / "clean.csv", tmp_path / "out"
    assert run("check", tmp_path / "all", "--output", output, "--write-clean", clean, "--json") == 0
    found = json.loads(capsys.readouterr().out)["problems"]
    names = {
        title: sorted({Path(image).name for problem in problems for image in problem["images"]})
        for title, problems in found.items()
    }
    assert names["Images that can't be read"] == ["cut.png"]
    assert names["The same image in different classes"] == ["1.png", "also.png", "copy.jpg"]
    assert names["The same image in train and test"] == ["3.png", "leak.png"]
    assert names["Copies within a part"] == ["2.png", "twice.png"]
    assert names["Very long images"] == ["long.png"]
    assert names["Tiny images"] == ["tiny.png"]
    assert names["Images of unusual modes"] == ["print.jpg"]
    assert names["Images of one colour"] == ["flat.png"]
    assert names["Classes of one image"] == ["one.png"]
    assert names["Files of several images"] == ["moves.webp"]
    alone = {problem["detail"] for problem in found["Classes that are in one part alone"]}
    assert {"cat is not in test", "dog is not in test"} <= alone
    (alike,) = found["Classes of nearly the same name"]
    assert alike["detail"] == "'Ant ', 'ant'"
    page = (output / "check.html").read_text()
    assert "The same image in train and test: 1" in page
    rows = list(csv.DictReader(clean.read_text().splitlines()))
    kept = {Path(row["image"]).name for row in rows if row["split"] == "train"}
    assert not kept & {"cut.png", "also.png", "copy.jpg", "twice.png"}
    assert "leak.png" in {Path(row["image"]).name for row in rows if row["split"] == "test"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "{folder}/ant"], "DATA '{folder}/ant' has 10 images but no subfolders"),
        (["tune", "nowhere"], "DATA 'nowhere' does not exist. Give images by class"),
        (["tune", "{folder}/a.zip"], "is an archive. Unpack it"),
        (["tune", "{folder}/ant/0.png"], "is neither a folder nor a table"),
        (["tune", "{folder}", "--model", "{folder}"], "--model '{folder}' has no config.json"),
        (["tune", "{folder}", "--model", "./none"], "--model: `source` './none' is neither"),
        (["tune", "{folder}", "--output", "{folder}/a.zip"], "--output '{folder}/a.zip' is a file"),
        (["tune", "{folder}", "--overwrite", "--resume"], "--overwrite starts anew"),
        (["tune", "{folder}", "--margin", "0.2"], "--margin 0.2 would be ignored"),
        (["tune", "{folder}", "--keep", "x", "--recipe", "plain"], "--keep x would be ignored"),
        (["tune", "{folder}", "--keep", "nowhere"], "--keep 'nowhere' does not exist"),
        (["tune", "{folder}", "--blend", "0"], "--blend 0 would leave the tower as it is"),
        (["tune", "{folder}", "--pairs", "sampled", "--compare"], "leave out --pairs sampled"),
        (
            ["tune", "{folder}", "--pairs", "sampled", "--preserve-embeddings", "1"],
            "--preserve-embeddings 1 needs all pairs of a batch",
        ),
        (["tune", "{folder}", "--hold-out-classes", "wasp"], "--hold-out-classes has ['wasp']"),
        (["tune", "{folder}", "--hold-out-classes", "ant,bee,cat"], "leaves no class to train on"),
        (["search", "{folder}", "{folder}/ant/0.png"], "INDEX '{folder}' is no index"),
    ],
)
def test_what_goes_wrong_is_one_line_that_names_the_argument(
    folder: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (folder / "a.zip").write_bytes(b"PK")
    filled = [each.format(folder=folder) for each in arguments]
    if filled[0] == "tune":
        for flag, value in (("--model", model), ("--output", folder.parent / "out")):
            filled += [] if flag in filled else [flag, str(value)]
    assert main(filled) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message.format(folder=folder) in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "x", "--output", "y", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["tune", "x"], "required: --output"),
        (["tune", "x", "--output", "y", "--test-fraction", "1.5"], "must be between 0 and 1"),
        (["search", "index"], "required: QUERY"),
        ([], "required: SUBCOMMAND"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_help_loads_nothing_heavy_and_tells_every_default() -> None:
    code = (
        "import sys\n"
        "from pairclip.command.running import parser\n"
        "parser().format_help()\n"
        "print(*sorted({'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []
    parts = parser()._subparsers
    assert parts is not None
    for name, part in parts._group_actions[0].choices.items():  # type: ignore[union-attr]
        text = " ".join(part.format_help().split())
        for action in part._actions:
            flagged = action.option_strings and not action.required and action.nargs != 0
            if flagged:
                start = text.index(f" {action.option_strings[0]} ", text.index("options:"))
                assert "default" in text[start : start + 400], (name, action.option_strings)


def test_an_interruption_and_a_closed_pipe_are_no_tracebacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    assert obey(interrupted, parser().parse_args(["search", "a", "b"])) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
