"""The examples, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

from pairclip import VisionTower

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10.py"
PICTURES = [
    f"{name}_{when}.png"
    for name in ("similarity", "class_similarity")
    for when in ("before", "after")
]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=300,
    )


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("runs") / "offline"
    done = run("--offline", "--output", output)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_offline_learns_to_tell_held_out_digits_apart(offline: tuple[Path, str]) -> None:
    output, printed = offline
    assert printed.splitlines()[0].startswith("OFFLINE: offline stand-in")
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics) == {"before", "after", "config"}
    assert metrics["before"]["recall_at_1"] <= 0.55
    assert metrics["after"]["recall_at_1"] >= 0.95
    assert metrics["after"]["mean_average_precision"] >= 0.90
    assert metrics["config"]["offline"] is True
    assert "stand-in" in metrics["config"]["note"]
    assert "| Recall at 1 |" in printed


def test_offline_writes_pictures_and_a_tower_that_transformers_loads(
    offline: tuple[Path, str],
) -> None:
    output, _ = offline
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "not CIFAR-10 and CLIP" in page
    assert page.count("data:image/") > 20
    for name in [*PICTURES, "history.png"]:
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
    model = CLIPVisionModelWithProjection.from_pretrained(output / "tower")
    processor = AutoImageProcessor.from_pretrained(output / "tower")
    pixels = processor(images=Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
    assert model(pixel_values=pixels).image_embeds.shape == (1, 32)


def test_under_a_launcher_the_processes_train_together_and_one_writes(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(EXAMPLE), "--offline", "--epochs=1", "--resume", f"--output={tmp_path}"],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| Recall at 1 |") == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000010"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number, name in enumerate(["ant", "bee", "cat"]):
        for part, count in (("train", 8), ("test", 4)):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(0, 60, (20, 20, 3), dtype=np.uint8)
                noise[..., number] += 150
                Image.fromarray(noise).save(tmp_path / "data" / part / name / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def model(tower: VisionTower, tmp_path: Path) -> Path:
    tower.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_of_images_and_a_folder_of_a_model(folder: Path, model: Path) -> None:
    output = folder.parent / "out"
    done = run(
        *("--data", folder, "--model", model, "--output", output, "--epochs", 1),
        *("--batch-size", 8, "--image-size", 24, "--hold-out-classes", "bee"),
        *("--train-per-class", 6, "--pairs", "sampled", "--negatives", "hinge", "--margin", 0.1),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["before"]["class_names"] == ["ant", "cat"]
    assert metrics["after"]["also"]["classes that were not trained on"]["class_names"] == ["bee"]
    assert metrics["before"]["num_images"] == 8
    assert metrics["config"]["margin"] == 0.1
    assert "12 images to train on, 8 to evaluate on" in done.stdout
    model = CLIPVisionModelWithProjection.from_pretrained(output / "tower")
    assert model(pixel_values=torch.zeros(1, 3, 24, 24)).image_embeds.shape == (1, 12)


def test_a_folder_without_a_test_part_is_split(folder: Path, model: Path) -> None:
    output = folder.parent / "out"
    done = run(
        *("--data", folder / "train", "--model", model, "--output", output, "--epochs", 1),
        *("--batch-size", 8, "--test-fraction", 0.25),
    )
    assert done.returncode == 0, done.stderr
    assert "18 images to train on, 6 to evaluate on" in done.stdout


def test_without_a_network_the_error_names_the_ways_out(tmp_path: Path, folder: Path) -> None:
    unreachable = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = run("--data", folder, "--output", tmp_path / "out", **unreachable)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for hint in ("openai/clip-vit-base-patch32", "--offline", "--data", "--model"):
        assert hint in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--negatives", "linear", "--margin", "0.2"], "`margin` 0.2 would be ignored"),
        (["--hold-out-classes", "wasp"], "--hold-out-classes has ['wasp']"),
        (["--hold-out-classes", "ant,bee"], "one class alone"),
        (["--hold-out-classes", "ant,bee,cat"], "leaves no class to train on"),
        (["--learning-rate", "1e38"], "Stopped at step"),
        (["--test-fraction", "1.5"], "--test-fraction must be between 0 and 1, got 1.5"),
        (["--image-size", "17"], "`image_size` must be a multiple of the patch size 8, got 17"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    folder: Path, model: Path, arguments: list[str], message: str
) -> None:
    done = run(
        *("--data", folder / "train", "--model", model, "--output", folder.parent / "out"),
        *("--batch-size", 8, *arguments),
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_with_the_output_shows_before_the_training(folder, model) -> None:
    (folder.parent / "file").write_text("")
    done = run("--data", folder, "--model", model, "--output", folder.parent / "file")
    assert done.returncode == 1
    assert "File exists" in done.stderr
    assert "images to train on" not in done.stdout


def test_an_empty_folder_is_an_error(tmp_path: Path, model: Path) -> None:
    (tmp_path / "nothing").mkdir()
    done = run("--data", tmp_path / "nothing", "--model", model, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr
