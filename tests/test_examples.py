"""The examples, run as a user runs them, or called within this process."""

import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

from pairclip import LabelledImages, load_tower
from pairclip.towers import random_tower

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = EXAMPLES / "cifar10.py"
PICTURES = [
    f"{name}_{when}.png"
    for name in ("similarity", "class_similarity")
    for when in ("before", "after")
]


def opened(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cifar10() -> ModuleType:
    return opened(EXAMPLE)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    output = tmp_path_factory.mktemp("runs") / "offline"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--offline", "--output", str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout, done.stderr


def test_offline_learns_to_tell_held_out_drawings_apart(offline: tuple[Path, str, str]) -> None:
    output, printed, said = offline
    assert said.splitlines()[0].startswith("OFFLINE: offline stand-in")
    metrics = json.loads((output / "metrics.json").read_text())
    # The start knows something already, as a pre-trained tower does.
    assert 0.5 < metrics["before"]["recall_at_1"] < 0.8
    assert metrics["after"]["recall_at_1"] >= 0.85
    assert metrics["after"]["mean_average_precision"] >= 0.7
    made = json.loads((output / "run.json").read_text())
    assert made["arguments"]["offline"] is True
    assert "stand-in" in made["note"]
    assert "| Recall at 1 |" in printed


def test_offline_writes_pictures_and_a_tower_that_transformers_loads(
    offline: tuple[Path, str, str],
) -> None:
    output, _, _ = offline
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "not CIFAR-10 and CLIP" in page
    assert page.count("data:image/") > 20
    for name in [*PICTURES, "history.png"]:
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
    model = CLIPVisionModelWithProjection.from_pretrained(output / "tower")
    processor = AutoImageProcessor.from_pretrained(output / "tower")
    pixels = processor(images=Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
    assert model(pixel_values=pixels).image_embeds.shape == (1, 128)


def test_under_a_launcher_the_processes_train_together_and_one_writes(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(EXAMPLE), "--offline", "--max-steps=2", "--resume", f"--output={tmp_path}"],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| Recall at 1 |") == 1
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tower"
    random_tower().save_pretrained(folder)
    return folder


def test_a_folder_of_images_and_a_folder_of_a_model(
    cifar10: ModuleType, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "out"
    arguments = (
        *("--data", folder, "--model", model, "--output", output, "--epochs", 1),
        *("--batch-size", 8, "--image-size", 24, "--hold-out-classes", "bee"),
        *("--train-per-class", 6, "--pairs", "sampled", "--negatives", "hinge", "--margin", 0.1),
    )
    assert cifar10.main([str(argument) for argument in arguments]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["before"]["class_names"] == ["ant", "cat"]
    assert metrics["after"]["also"]["classes that were not trained on"]["class_names"] == ["bee"]
    assert metrics["before"]["num_images"] == 8
    assert "12 images to train on, 8 to evaluate on: trained on train" in capsys.readouterr().out
    tuned = load_tower(output / "tower")
    assert tuned(torch.zeros(1, 3, 24, 24)).shape[0] == 1


def test_without_a_network_the_error_names_the_ways_out(
    cifar10: ModuleType, tmp_path: Path, folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--data", str(folder), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")},
        timeout=300,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for hint in ("openai/clip-vit-base-patch32", "Without a network, give a folder", "--model"):
        assert hint in done.stderr


class Mirror(BaseHTTPRequestHandler):
    """Serves one archive; nothing where it is asked for another."""

    archive: bytes

    def do_GET(self) -> None:
        content = self.archive if self.path == "/good.tar.gz" else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(
    cifar10: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThreadingHTTPServer]:
    """A server with a small CIFAR-10 in place of the known ones."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for name, part in (("data_batch_1", "train_list"), ("test_batch", "test_list")):
        labels = [number % 10 for number in range(40)]
        pixels = generator.integers(0, 256, (40, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
        lists[part].append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    meta = {"filename": "batches.meta", "key": "label_names"}
    meta["md5"] = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    archive = Path(shutil.make_archive(str(tmp_path / "a"), "gztar", tmp_path, folder.name))
    shutil.rmtree(folder)
    monkeypatch.setattr(Mirror, "archive", archive.read_bytes(), raising=False)
    for name, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    mirrors = (f"{url}/none.tar.gz", "http://127.0.0.1:9/closed.tar.gz", f"{url}/good.tar.gz")
    monkeypatch.setattr(cifar10, "MIRRORS", mirrors)
    yield server
    server.shutdown()
    server.server_close()


def test_cifar10_comes_from_a_mirror_and_both_times_are_said_before(
    cifar10: ModuleType,
    mirror: ThreadingHTTPServer,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cifar10, "seconds_per_image", lambda tower: (0.0625, 0.125))
    where = ["--model", str(model), "--download-dir", str(tmp_path / "data")]
    where += ["--output", str(tmp_path / "out"), "--test-per-class", "2"]
    options = ["--batch-size", "20", "--epochs", "1", "--num-workers", "0"]
    assert cifar10.main([*where, *options]) == 0
    said = capsys.readouterr().err
    assert re.search(r"Downloading CIFAR-10, 170 MB, from \S+/good\.tar\.gz: about .*\.\n", said)
    # 2 x 20 images embedded to evaluate, 40 to look back at, 40 to train on
    assert "Training and evaluating take about 10 s on this cpu.\n" in said
    assert len(load_tower(tmp_path / "out" / "tower").blocks) == 2
    mirror.shutdown()
    assert cifar10.main([*where, *options, "--overwrite", "--max-steps", "1"]) == 0
    assert "Downloading" not in capsys.readouterr().err


def test_on_a_cpu_the_default_size_is_one_that_ends_within_half_an_hour(
    cifar10: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cifar10, "seconds_per_image", lambda tower: (0.025, 0.075))
    args = cifar10.parse(["--epochs", "4"])
    cifar10.tune.check(args)
    cifar10.plan(None, args, 50_000, 10)
    assert args.train_per_class == int((1500 - 4000 * 0.025) / (0.025 + 4 * 0.075) / 10)
    assert (
        "Training on 430 images of each class (--train-per-class) and evaluating take"
        in capsys.readouterr().err
    )
    for given in (["--train-per-class", "5000"], ["--max-steps", "7"]):
        args = cifar10.parse(given)
        cifar10.tune.check(args)
        cifar10.plan(None, args, 50_000, 10)
        assert args.train_per_class == (5000 if "--train-per-class" in given else None)


def test_a_cifar10_that_nobody_has_is_an_error_with_ways_out(
    cifar10: ModuleType,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cifar10, "MIRRORS", ("http://127.0.0.1:9/closed.tar.gz",))
    where = ["--download-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert cifar10.main(["--model", str(model), *where]) == 1
    said = capsys.readouterr().err
    assert "could not be downloaded. No answer from http://127.0.0.1:9/closed" in said
    assert "use --offline, or --data FOLDER" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "1e38"], "Stopped at step"),
        (["--image-size", "17"], "--image-size must be a multiple of the patch size 8, got 17"),
    ],
)
def test_what_the_library_refuses_ends_in_one_line(
    cifar10: ModuleType,
    folder: Path,
    model: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--data", str(folder), "--model", str(model), "--output", str(folder.parent / "out")]
    assert cifar10.main([*places, "--batch-size", "8", *arguments]) == 1
    (line,) = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE)
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offline", "--data", "x"], "leave out --data"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    cifar10: ModuleType,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cifar10.main(arguments)
    assert message in capsys.readouterr().err


def test_the_script_that_trains_a_start_makes_a_tower_that_loads(tmp_path: Path) -> None:
    opened(EXAMPLES / "offline" / "drawings.py").save(tmp_path / "images", per_class=2)
    assert len(LabelledImages(str(tmp_path / "images"))) == 24
    options = ["--epochs", "1", "--batch-size", "12", "--num-workers", "0"]
    opened(EXAMPLES / "offline" / "pretrain.py").main(
        [str(tmp_path / "images"), "--output", str(tmp_path / "tower"), *options]
    )
    tower = load_tower(tmp_path / "tower")
    shipped = load_tower(EXAMPLES / "offline" / "tower")
    assert {name: w.shape for name, w in tower.state_dict().items()} == {
        name: w.shape for name, w in shipped.state_dict().items()
    }
