"""The `pairclip` command, called within this process."""

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPVisionModelWithProjection

import pairclip
from pairclip.command import main
from pairclip.command.data import open_split
from pairclip.command.outputs import open_run
from pairclip.command.running import obey, parser
from pairclip.command.tuning import tune as tune_now
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


def test_few_images_make_smaller_batches_and_a_larger_one_is_refused(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = ("tune", folder, "--model", model, "--test-fraction", 0.4, "--max-steps", 1)
    assert run(*tune, "--output", tmp_path / "out") == 0  # no warning, either
    assert "Batches have 18 of them." in capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "run.json").read_text())
    assert made["arguments"]["batch_size"] == 18
    assert run(*tune, "--output", tmp_path / "other", "--batch-size", 50) == 1
    error = capsys.readouterr().err
    assert "--batch-size must be at most two per image, got 50 for the 18 images" in error
    assert not (tmp_path / "other").exists()


def test_ctrl_c_is_one_line_and_resume_continues(
    folder: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out"
    tune = ("tune", folder, "--model", model, "--output", output, "--max-steps", 2)
    tune = (*tune, "--batch-size", 8)
    begin_again = "Interrupted. No checkpoint was written yet: the same command starts from the"
    with monkeypatch.context() as patched:
        patched.setattr(pairclip.Finetuner, "fit", stop)
        assert run(*tune, "--resume") == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"{begin_again} beginning."
    assert run(*tune, "--resume", "--seed", 1) == 0  # nothing is there that other settings harm
    said = f"Nothing was kept of the run in '{output}', so it starts from the beginning."
    assert said in capsys.readouterr().out
    assert (output / "checkpoints" / "step-00000002").is_dir()
    tower = (output / "tower" / "model.safetensors").read_bytes()

    assert run(*tune, "--seed", 1) == 1
    assert capsys.readouterr().err.rstrip().endswith("Give another folder, or --overwrite.")
    assert run(*tune, "--resume", "--blend", 0.5) == 1
    said = capsys.readouterr().err
    assert "which had other settings: --blend was 0.8; --seed was 1. Give the same" in said
    other = tmp_path / "other"
    shutil.copytree(folder / "ant", other / "ant")
    shutil.copytree(folder / "bee", other / "bee")
    assert run("tune", other, *tune[2:], "--resume", "--seed", 1) == 1
    assert "which had other settings: DATA is another one." in capsys.readouterr().err
    assert run(*tune, "--resume", "--seed", 1, "--embed-batch-size", 7) == 0  # evaluates again
    assert (output / "tower" / "model.safetensors").read_bytes() == tower

    (output / "tower").rename(tmp_path / "tower")
    (output / "metrics.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(pairclip.Finetuner, "fit", stop)
        assert run(*tune, "--resume", "--seed", 1) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "Interrupted. The same command continues from the last checkpoint."


def test_a_finished_run_without_checkpoints_is_not_trained_again(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (output / "tower").mkdir(parents=True)
    tune = ("tune", folder, "--model", model, "--output", output)
    assert run(*tune, "--resume") == 1
    said = capsys.readouterr().err
    assert f"--output '{output}' holds a finished run (tower) without checkpoints, so" in said
    assert "nothing to continue. Give another folder, or --overwrite instead of --resume." in said
    (output / "tower").rmdir()
    for made in ("checkpoints", "recipes"):
        (output / made).mkdir()
    assert run(*tune) == 1
    assert "Give another folder, or --overwrite.\n" in capsys.readouterr().err
    (output / "recipes" / "trial-1.json").touch()
    assert run(*tune) == 1
    assert "or --overwrite, or --resume to continue that run.\n" in capsys.readouterr().err


def test_ctrl_c_while_recipes_are_tried_says_how_it_goes_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "recipes").mkdir(parents=True)
    (tmp_path / "out" / "recipes" / "trial-1.json").touch()
    arguments = ["tune", str(folder), "--output", str(tmp_path / "out"), "--overwrite", "--compare"]
    args = parser().parse_args(arguments)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="with --resume continues from the last recipe"):
        tune_now(args, open_split("DATA", folder, args), stop)


def test_evaluate_alone_and_against_another_tower(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", model, folder) == 0
    assert "| Recall at 1 | " in capsys.readouterr().out
    output = tmp_path / "out"
    (folder / "ant" / "broken.png").write_bytes(b"no image")
    against = ("--against", model, "--output", output, "--json")
    assert run("evaluate", model, folder, *against) == 1
    (folder / "ant" / "broken.png").unlink()
    capsys.readouterr()
    assert run("evaluate", model, folder, *against) == 0  # nothing is there that could be lost
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["before"]["recall_at_1"] == metrics["after"]["recall_at_1"]
    assert "Two towers compared" in (output / "report.html").read_text()


def test_unreadable_images_are_skipped_or_named_once_with_what_to_do(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = folder / "ant" / "broken.png"
    broken.write_bytes(b"no image")
    assert run("evaluate", model, folder) == 1
    said = capsys.readouterr().err
    assert said.count(str(broken)) == 1
    assert "can't be read: cannot identify image file. Leave out such images with" in said
    assert f"--skip-unreadable, or list all of them: pairclip check {folder} --write-clean" in said
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the command prints them
        assert run("evaluate", model, folder, "--skip-unreadable", "--json") == 0
        printed, said = capsys.readouterr()
        assert json.loads(printed)["num_images"] == 30
        assert "1 of 31 images can't be read" in said
        tune = ("tune", folder, "--model", model, "--output", tmp_path / "out", "--max-steps", 1)
        assert run(*tune, "--batch-size", 8, "--skip-unreadable") == 0
    data = json.loads((tmp_path / "out" / "run.json").read_text())["data"]
    assert data["train"]["images"] + data["test"]["images"] == 30


def test_too_few_images_are_said_before_anything_is_embedded(
    folder: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairclip, "load_tower", None)
    tune = ("tune", folder, "--model", model, "--output", tmp_path / "out")
    assert run(*tune, "--test-fraction", 0.1) == 1
    said = capsys.readouterr().err
    assert "There is one image of each class to evaluate on (10% of each class held out" in said
    assert "Give a larger --test-fraction than 0.1" in said
    for path in folder.rglob("[1-9].png"):
        path.unlink()
    assert run("evaluate", model, folder) == 1
    assert f"DATA '{folder}' has one image of each class, and" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_index_and_search(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ant" / "broken.jpg").write_bytes(b"no image")
    index = tmp_path / "index"
    assert run("index", model, folder, "--output", index) == 0
    said = capsys.readouterr().out
    assert "LEFT OUT, because they can't be read: 1 of the images." in said
    assert said.count("broken.jpg") == 1
    assert f"Images in {index}: 30." in said
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
    assert run("search", index, queries[0], "--html", page) == 1
    said = capsys.readouterr().err
    assert f"--html '{page}/search.html' is there already. Give another place, or --over" in said
    assert run("search", index, queries[0], "--html", page, "--overwrite") == 0
    assert "Searched for" in (page / "search.html").read_text()
    assert run("search", index, queries[0], "--min-score", 1) == 0
    assert "Nothing." in capsys.readouterr().out
    for content in ("{}", "[]", "dam"):
        (index / "contents.json").write_text(content)
        assert run("search", index, queries[0]) == 1
        assert f"error: '{index}/contents.json' is damaged: it is not" in capsys.readouterr().err


def test_evaluate_searches_a_gallery(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = tmp_path / "parts"
    for part, wanted in (("test", "[0-3].png"), ("train", "[4-9].png")):
        for path in folder.glob(f"*/{wanted}"):
            (parts / part / path.parent.name).mkdir(parents=True, exist_ok=True)
            path.rename(parts / part / path.parent.name / path.name)
    evaluate = ("evaluate", model, parts)
    assert run(*evaluate) == 1
    assert "has train and test: choose one, --split test" in capsys.readouterr().err
    assert run(*evaluate, "--split", "val") == 1
    assert "has no part 'val': train and test" in capsys.readouterr().err
    options = ("--split", "test", "--gallery", parts, "--gallery-split", "train")
    assert run(*evaluate, *options, "--output", tmp_path / "out", "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    tower = pairclip.load_tower(model)
    test, train = (pairclip.LabelledImages(parts / part) for part in ("test", "train"))
    expected = pairclip.evaluate(tower, test, train)
    assert metrics["mean_average_precision"] == pytest.approx(expected.mean_average_precision)
    assert "among 18 of a gallery" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["gallery"]["images"] == 18


def test_evaluate_takes_queries_gallery_and_exclude_from_columns_of_a_table(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(folder.rglob("*.png"))
    rows = [(path, path.parent.name, i % 3 == 0, i % 3 > 0, i % 2) for i, path in enumerate(paths)]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "is_query", "is_gallery", "camera"])
        table.writerows(rows)
    options = ("--split", "is_query", "--gallery", tmp_path / "table.csv")
    options = (*options, "--gallery-split", "is_gallery", "--exclude", "camera", "--json")
    assert run("evaluate", model, tmp_path / "table.csv", *options) == 0
    metrics = json.loads(capsys.readouterr().out)
    parts = [[row for row in rows if row[column]] for column in (2, 3)]
    queries, gallery = (([str(row[0]) for row in p], [row[1] for row in p]) for p in parts)
    expected = pairclip.evaluate(
        pairclip.load_tower(model),
        queries,
        gallery,
        exclude=tuple([row[4] for row in p] for p in parts),
    )
    assert metrics["mean_average_precision"] == pytest.approx(expected.mean_average_precision)
    assert metrics["num_images"] == 10


def test_evaluate_says_from_where_on_images_are_called_one_class(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", model, folder, "--false-match-rate", 0.05, "--json") == 0
    printed, said = capsys.readouterr()
    images = pairclip.LabelledImages(folder)
    embeddings = pairclip.embed_images(pairclip.load_tower(model), images)
    chosen = pairclip.choose_threshold(embeddings, images.labels, false_match_rate=0.05)
    found = json.loads(printed)["threshold"]
    assert found["threshold"] == pytest.approx(chosen.threshold)
    assert found["false_match_rate"] <= 0.05
    assert f"From a cosine of {chosen.threshold:.3f} on, {chosen.false_match_rate:.2%} of" in said


def test_evaluate_says_where_the_images_were_trained_on(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"train": {"images": 24}, "test": {"images": 6}}
    args = argparse.Namespace(data=folder, overwrite=False, subcommand="pairclip tune")
    open_run(tmp_path / "run", args, (), data=facts)
    shutil.copytree(model, tmp_path / "run" / "tower")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the command prints them
        assert run("evaluate", tmp_path / "run" / "tower", folder) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"warning: MODEL was tuned on 24 of the images of '{folder}', so these")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run("evaluate", model, folder, "--against", tmp_path / "run" / "tower") == 0
    assert capsys.readouterr().err.startswith("warning: --against was tuned on 24 of the images")
    folder.rename(tmp_path / "other")
    assert run("evaluate", tmp_path / "run" / "tower", tmp_path / "other") == 0
    assert "tuned on" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_export_writes_what_computes_the_same(
    dtype: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3), dtype=np.uint8)
    expected = pairclip.embed_images(pairclip.load_tower(model), images)
    tolerance = {"float32": 1e-5, "float16": 2e-2}[dtype]
    export = ("export", model, "--dtype", dtype, "--json", "--to")
    folder = tmp_path / "a" / "folder"
    assert run(*export, "sentence-transformers", "--output", folder) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parity"]["largest_difference"] <= tolerance
    assert (folder / "modules.json").is_file()
    written = pairclip.embed_images(pairclip.load_tower(folder), images)
    assert_close(written, expected, atol=tolerance, rtol=0)
    if dtype == "float16":
        assert CLIPVisionModelWithProjection.from_pretrained(folder).dtype == torch.float16
    assert run(*export, "transformers", "--output", folder) == 1
    assert "is there already. Give another place, or --overwrite" in capsys.readouterr().err

    assert run(*export, "onnx", "--output", tmp_path / "b" / "tower.onnx") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == dtype
    assert (tmp_path / "b" / "tower.onnx").is_file()
    for to, path, message in (
        ("timm", "t", "--to timm needs a model of timm, and MODEL is of transformers"),
        ("onnx", "t", "must be a file that ends with .onnx"),
        ("transformers", "t.onnx", "must be a folder, for --to transformers"),
        ("onnx", "b/tower.onnx", "is there already"),
    ):
        assert run(*export, to, "--output", tmp_path / path) == 1
        assert message in capsys.readouterr().err


def test_check_prints_and_writes_what_was_found(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ant" / "cut.png").write_bytes((folder / "ant" / "0.png").read_bytes()[:200])
    with Image.open(folder / "cat" / "2.png") as image:
        image.save(folder / "cat" / "twice.png")
    clean, output = tmp_path / "clean.csv", tmp_path / "new" / "out"
    options = ("--model", model, "--output", output, "--write-clean", clean, "--doubtful", -9)
    assert run("check", folder, *options) == 0
    said = capsys.readouterr().out
    assert "all: 32 images, 10 to 11 of each of 3 classes." in said
    assert "Images that can't be read: 1" in said
    assert "Labels that may be wrong: 31" in said
    assert "  and 21 more" in said
    assert f"Images in {clean}: 30 of 32." in said
    page = (output / "check.html").read_text()
    assert "Copies within a part: 1" in page
    assert "At most one of the labels is right" not in page
    rows = list(csv.DictReader(clean.read_text().splitlines()))
    assert len(rows) == 30
    assert rows[0]["image"] == "data/ant/0.png"
    apart = tmp_path / "new" / "apart.csv"
    assert run("check", folder, "--write-clean", apart) == 0
    assert str(folder.resolve() / "ant" / "0.png") in apart.read_text()
    assert run("check", folder, "--write-clean", clean) == 1
    assert f"--write-clean '{clean}' is there already. Give another" in capsys.readouterr().err
    assert run("check", folder, "--write-clean", clean, "--overwrite") == 0
    rows = list(csv.DictReader(clean.read_text().splitlines()))
    assert [row["doubt"] for row in rows] == [""] * 30
    capsys.readouterr()
    for place in ("clean.csv", "data"):  # both move together
        (tmp_path / "moved").mkdir(exist_ok=True)
        shutil.move(tmp_path / place, tmp_path / "moved" / place)
    assert run("check", tmp_path / "moved" / "clean.csv", "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == {}


@pytest.mark.parametrize("subcommand", ["index", "tune"])
def test_a_real_ctrl_c_is_one_line(
    subcommand: str, folder: Path, model: Path, tmp_path: Path
) -> None:
    """Sent when the work has begun; what was written before is whole."""
    arguments, begun = {
        "index": (["index", model, folder, "--output", tmp_path / "out"], "Images in"),
        "tune": (
            [
                *("tune", folder, "--model", model, "--output", tmp_path / "out", "--resume"),
                *("--batch-size", 8, "--max-steps", 100_000),
            ],
            "Fine-tuning with a rate",
        ),
    }[subcommand]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pairclip", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if begun in line:
            break
    time.sleep(0.2 * (subcommand == "tune"))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line and "warning" not in line]
    assert lines[-1].startswith("Interrupted.")
    if subcommand == "tune":
        assert lines[-1].endswith("The same command continues from the last checkpoint.")
        assert json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["resume"]
        assert pairclip.newest_checkpoint(tmp_path / "out" / "checkpoints") is not None
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "{folder}/ant"], "DATA '{folder}/ant' has 10 images but no subfolders"),
        (["tune", "nowhere"], "DATA 'nowhere' does not exist. Give images by class"),
        (["tune", "{folder}/a.zip"], "is an archive. Unpack it"),
        (["tune", "{folder}/ant/0.png"], "is neither a folder nor a table"),
        (["tune", "{folder}", "--model", "{folder}"], "--model '{folder}' has no config.json"),
        (["tune", "{folder}", "--model", "./none"], "--model './none' does not exist"),
        (["tune", "{folder}", "--output", "{folder}/a.zip"], "--output '{folder}/a.zip' is a file"),
        (["tune", "{folder}", "--overwrite", "--resume"], "--overwrite starts anew"),
        (["tune", "{folder}", "--margin", "0.2"], "--margin 0.2 would be ignored"),
        (["tune", "{folder}", "--keep", "x", "--recipe", "plain"], "--keep x would be ignored"),
        (["tune", "{folder}", "--keep", "nowhere"], "--keep 'nowhere' does not exist"),
        (["tune", "{folder}", "--blend", "0"], "--blend 0 would leave the tower as it is"),
        (["tune", "{folder}", "--pairs", "sampled", "--compare"], "--pairs sampled would be"),
        (["tune", "{folder}", "--blend", "0.5", "--compare"], "--blend 0.5 would be ignored"),
        (["tune", "{folder}", "--compare-steps", "9"], "there is no --compare"),
        (
            ["tune", "{folder}", "--pairs", "sampled", "--preserve-embeddings", "1"],
            "--preserve-embeddings 1 needs all pairs of a batch",
        ),
        (["tune", "{folder}", "--hold-out-classes", "wasp"], "--hold-out-classes has ['wasp']"),
        (["tune", "{folder}", "--hold-out-classes", "ant,bee,cat"], "leaves no class to train on"),
        (["tune", "{folder}", "--keep", "{folder}/a.zip"], "--keep '{folder}/a.zip' is a file"),
        (["tune", "{folder}", "--root", "x"], "--root x would be ignored: it is of a table"),
        (["tune", "{folder}", "--hold-out-classes", "ant,bee"], "There is one class to train on"),
        (["tune", "{folder}/t.csv"], "has no column 'image', but ['file', 'label']. Name its"),
        (["tune", "{folder}/t.csv", "--image-column", "file"], "Say with --root where paths"),
        (["tune", "{folder}", "--output", "{folder}/a.zip/x"], "--output: nothing can be written"),
        (["evaluate", "x/y", "{folder}", "--split", "a", "--root", "b"], "--root b would be"),
        (["evaluate", "./x", "{folder}"], "MODEL './x' does not exist. Give the folder of a"),
        (["export", "./x", "--to", "onnx", "--output", "{folder}/n.onnx"], "MODEL './x' does not"),
        (["check", "{folder}", "--doubtful", "0.1"], "--doubtful 0.1 would be ignored"),
        (["search", "x", "y", "--html", "{folder}"], "INDEX 'x' is no index"),
        (["evaluate", "{folder}", "{folder}"], "MODEL '{folder}' has no config.json"),
        (["evaluate", "x", "{folder}", "--gallery-split", "a"], "there is no --gallery"),
        (["check", "{folder}", "--overwrite"], "--overwrite would be ignored"),
        (["check", "{folder}", "--write-clean", "a.txt"], "must be a file that ends in .csv"),
        (["index", "x", "nowhere", "--output", "y"], "FOLDER 'nowhere' does not exist"),
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
    (folder / "t.csv").write_text("file,label\nno/1.png,cat\n")
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
        (["tune", "x", "--output", "y", "--margin", "nan"], "--margin: must be between -1 and 1"),
        (
            ["tune", "x", "--output", "y", "--preserve-embeddings", "inf"],
            "must be a finite number of at least 0, got inf",
        ),
        (["tune", "x", "--output", "y", "--seed", "9" * 30], "--seed: must be at most 2147483647"),
        (["tune", "x", "--output", "y", "--test-per-class", "1"], "must be at least 2, got 1"),
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


def test_contents_never_tell_of_another_index(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    assert run("index", model, folder, "--output", index) == 0
    (folder / "ant" / "0.png").rename(tmp_path / "0.png")

    def ended(path: Path, content: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("pairclip.command.outputs.write_json", ended)
        assert run("index", model, folder, "--output", index) == 1
    (tmp_path / "0.png").rename(folder / "ant" / "0.png")
    # As the old contents say, but the index is of one image less.
    assert run("index", model, folder, "--output", index) == 1
