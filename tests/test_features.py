"""Cached features: those of the trunk, found again, and whole or not there."""

import copy
import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import killed_at
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pairclip import (
    AllPairsCosineLoss,
    Finetuner,
    LabelledImages,
    VisionTower,
    class_names_of,
    embed_images,
    evaluate,
    labels_of,
)
from pairclip.features import CachedFeatures, cache_features

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "images" / ["ant", "bee"][number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def by_hand(trunk: VisionTower, pictures: np.ndarray) -> Tensor:
    return trunk(torch.stack([trunk.preprocess(Image.fromarray(p)) for p in pictures]))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def computes(trunk: VisionTower, dataset: Any, folder: Path, **options: Any) -> bool:
    """Whether the features are not found, but computed: then there is one more file."""
    before = files(folder)
    cache_features(trunk, dataset, folder, **options)
    return files(folder) != before


# What is cached


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_those_of_the_trunk(tower, images, tmp_path, dtype, num_workers) -> None:
    trunk, _ = tower.split(1)
    options = {"dtype": dtype, "batch_size": 7, "num_workers": num_workers}
    features = cache_features(trunk, images, tmp_path / "new" / "folder", **options)
    expected = by_hand(trunk, images[0])
    assert len(features) == 48
    values = torch.stack([features[i][0] for i in range(48)])
    assert values.dtype == dtype
    assert_close(values, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert [features[i][1] for i in range(48)] == images[1] == features.labels.tolist()
    with pytest.raises(IndexError):
        features[48]
    # It is a file that others can read.
    assert torch.equal(load_file(features.path)["features"], values)
    assert files(features.path.parent) == [features.path.name]


def test_features_go_to_workers_by_path(tower, images, tmp_path) -> None:
    features = cache_features(tower.split(1)[0], images, tmp_path)
    assert len(pickle.dumps(features)) < 1000
    again = pickle.loads(pickle.dumps(features))
    assert torch.equal(again[5][0], features[5][0])
    loader = DataLoader(features, batch_size=16, num_workers=2)
    batches = list(loader)
    assert torch.equal(torch.cat([labels for _, labels in batches]), features.labels)
    assert torch.equal(batches[1][0][0], features[16][0])


def test_features_are_mapped_and_not_read(tower, tmp_path) -> None:
    trunk, _ = tower.split(0)
    features = cache_features(trunk, (np.zeros((1, 16, 16, 3), np.uint8), [0]), tmp_path)
    large = {"features": torch.zeros(1000, 100, 500), "labels": torch.zeros(1000).long()}
    metadata = {**features.metadata, "format": "pairclip features 1"}
    save_file(large, tmp_path / "large", metadata=metadata)
    del large
    size = (tmp_path / "large").stat().st_size
    before = memory()
    opened = CachedFeatures(tmp_path / "large")
    assert len(opened) == 1000
    assert opened[999][0].sum() == 0
    assert memory() - before < size / 20


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_features_are_a_labelled_dataset(tower, image_folder, tmp_path) -> None:
    images = ImageFolder(image_folder)
    features = cache_features(tower.split(1)[0], images, tmp_path / "cache")
    assert labels_of(features).tolist() == [0, 0, 0, 1, 1, 1]
    assert class_names_of(features) == ["ant", "bee"]
    part = Subset(features, [5, 0])
    joined = ConcatDataset([part, features])
    for dataset, labels in (
        (features, [0, 0, 0, 1, 1, 1]),
        (part, [1, 0]),
        (joined, [1, 0, 0, 0, 0, 1, 1, 1]),
    ):
        data = LabelledImages(LabelledImages(dataset))
        assert data.of_features
        assert data.labels.tolist() == labels
        assert data.class_names == ["ant", "bee"]
        assert data[1][0].dtype == torch.float16
        assert torch.equal(data[1][0], dataset[1][0])
        assert data[1][1] == labels[1]
    assert not LabelledImages(images).of_features
    with pytest.raises(ValueError, match="The joined datasets are images and cached features"):
        LabelledImages(ConcatDataset([features, images]))
    with pytest.raises(TypeError, match="`dataset` must be of images, got features that are"):
        cache_features(tower.split(1)[0], features, tmp_path / "cache")


# Training on it


def test_the_head_embeds_and_is_evaluated_as_the_tower(tower, images, tmp_path) -> None:
    trunk, head = tower.split(1)
    features = cache_features(trunk, images, tmp_path, dtype=torch.float32)
    expected = embed_images(tower, images)
    assert_close(embed_images(head, features), expected, rtol=0, atol=1e-6)
    some = embed_images(head, Subset(features, [3, 1]), num_workers=2)
    assert_close(some, expected[[3, 1]], rtol=0, atol=1e-6)
    whole, part = evaluate(tower, images).to_dict(), evaluate(head, features).to_dict()
    assert part["mean_average_precision"] == pytest.approx(whole["mean_average_precision"])
    half = cache_features(trunk, images, tmp_path)
    assert_close(embed_images(head, half), expected, rtol=0, atol=1e-2)


def test_training_on_features_is_training_the_tower(tower, images, tmp_path) -> None:
    cut = copy.deepcopy(tower)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    trunk, head = cut.split(1)
    features = cache_features(trunk, images, tmp_path, dtype=torch.float32)
    tower.freeze(all_but_last=1)
    for model, data in ((tower, images), (head, features)):
        Finetuner(
            model,
            AllPairsCosineLoss(negatives="squared"),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3),
            max_grad_norm=None,
        ).fit(data, batch_size=12, max_steps=10)
    moved, apart = (
        torch.cat([(a[name] - b[name]).flatten() for name in before]).norm()
        for a, b in ((tower.state_dict(), before), (tower.state_dict(), cut.state_dict()))
    )
    assert moved > 0.01
    assert apart <= 1e-4 * moved
    assert_close(embed_images(cut, images), embed_images(head, features), rtol=0, atol=1e-6)


def test_images_are_not_for_the_head_nor_features_for_the_tower(tower, images, tmp_path) -> None:
    trunk, head = tower.split(1)
    features = cache_features(trunk, images, tmp_path)
    with pytest.raises(TypeError, match=r"features, got Image. Compute them once"):
        embed_images(head, images)
    with pytest.raises(TypeError, match=r"got Tensor.*head of `tower.split\(k\)`"):
        embed_images(tower, features)


# Found again


def test_the_same_features_are_found_and_said_so(tower, images, tmp_path, capsys) -> None:
    trunk, _ = tower.split(1)
    first = cache_features(trunk, images, tmp_path)
    assert capsys.readouterr().out == ""
    stamp = first.path.stat().st_mtime_ns
    trunk, head = copy.deepcopy(tower).split(1)
    with torch.no_grad():  # the head may have been trained since
        for parameter in head.parameters():
            parameter.add_(1)
    again = cache_features(trunk, (images[0].copy(), images[1]), tmp_path, batch_size=5)
    assert again.path == first.path
    assert again.path.stat().st_mtime_ns == stamp
    expected = f"Found the features of these 48 images in '{first.path}'.\n"
    assert capsys.readouterr().out == expected


def test_another_tower_cut_type_or_preprocessing_is_other_features(tower, images, tmp_path) -> None:
    trunk, _ = tower.split(1)
    assert not tmp_path.joinpath("x").exists()
    cache_features(trunk, images, tmp_path)
    assert not computes(trunk, images, tmp_path)
    assert computes(tower.split(0)[0], images, tmp_path)
    assert computes(trunk, images, tmp_path, dtype=torch.float32)
    other = copy.deepcopy(tower)
    with torch.no_grad():
        other.model.vision_model.embeddings.position_embedding.weight[0, 0] += 1e-3
    assert computes(other.split(1)[0], images, tmp_path)
    other = copy.deepcopy(tower)
    other.image_processor.image_std = [0.5, 0.5, 0.5]
    assert computes(other.split(1)[0], images, tmp_path)


def test_other_arrays_or_labels_are_other_data(tower, images, tmp_path) -> None:
    trunk, _ = tower.split(1)
    pictures, labels = images
    cache_features(trunk, images, tmp_path)
    changed = pictures.copy()
    changed[1, 0, 0, 0] ^= 1  # not one of the images that are decoded
    assert computes(trunk, (changed, labels), tmp_path)
    assert not computes(trunk, (list(pictures), labels), tmp_path)
    assert computes(trunk, (pictures, [0] * 48), tmp_path)
    assert computes(trunk, (pictures, ["a"] * 48), tmp_path)
    assert computes(trunk, (pictures[:40], labels[:40]), tmp_path)
    tensors = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    dataset = TensorDataset(tensors, torch.tensor(labels))
    for expected in (True, False):
        with pytest.warns(UserWarning, match="TensorDataset does not tell its labels"):
            assert computes(trunk, dataset, tmp_path) == expected


def test_changed_files_and_transforms_are_other_data(tower, image_folder, tmp_path) -> None:
    trunk, _ = tower.split(1)
    cache = tmp_path / "cache"
    images = ImageFolder(image_folder)
    cache_features(trunk, images, cache)
    assert not computes(trunk, ImageFolder(image_folder), cache)
    assert computes(trunk, Subset(images, [0, 1, 2, 3]), cache)
    assert computes(trunk, ImageFolder(image_folder, transforms.Grayscale()), cache)
    assert not computes(trunk, ImageFolder(image_folder, transforms.Grayscale()), cache)
    path = image_folder / "ant" / "2.png"
    os.utime(path, ns=(1, 1))
    assert computes(trunk, images, cache)
    path.rename(path.with_name("3.png"))
    assert computes(trunk, ImageFolder(image_folder), cache)


class Opaque(Dataset[Any]):
    """Tells its labels, and nothing of where its images are from."""

    def __init__(self, pictures: np.ndarray, change: Any = None) -> None:
        self.pictures, self.targets = pictures, [0, 1] * (len(pictures) // 2)
        self.change = change

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        picture = self.pictures[index]
        return (picture if self.change is None else self.change(picture)), self.targets[index]


def test_of_other_datasets_256_images_are_looked_at(tower, tmp_path) -> None:
    trunk, _ = tower.split(1)
    pictures = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), dtype=np.uint8)
    cache_features(trunk, Opaque(pictures), tmp_path)
    looked_at = np.unique(np.linspace(0, 399, 256).round().astype(int))
    for index in (looked_at[7], 399):
        changed = pictures.copy()
        changed[index] ^= 1
        assert computes(trunk, Opaque(changed), tmp_path)
    assert not computes(trunk, Opaque(pictures.copy()), tmp_path)


# Refused


def own_noise(picture: np.ndarray) -> np.ndarray:
    return picture ^ np.random.default_rng().integers(0, 2, picture.shape, dtype=np.uint8)


def rarely(picture: np.ndarray) -> np.ndarray:
    return picture if random.random() < 1 - 1e-9 else 255 - picture


def with_numpy(picture: np.ndarray) -> np.ndarray:
    return picture if np.random.random() < 1 - 1e-9 else 255 - picture  # noqa: NPY002


FLIP = transforms.Compose([transforms.ToPILImage(), transforms.RandomHorizontalFlip(1e-9)])


@pytest.mark.parametrize("change", [own_noise, rarely, with_numpy, FLIP])
def test_a_random_transform_is_refused(tower, images, tmp_path, change) -> None:
    dataset = Opaque(images[0], change)
    message = r"Image 0 of `dataset` is read through a random transform.*freeze\(all_but_last=k\)"
    with pytest.raises(ValueError, match=message):
        cache_features(tower.split(1)[0], dataset, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_global_generators_are_left_alone(tower, images, tmp_path) -> None:
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    cache_features(tower.split(1)[0], images, tmp_path)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_features_that_do_not_fit_the_type(tower, images, tmp_path) -> None:
    with torch.no_grad():
        tower.model.vision_model.encoder.layers[0].mlp.fc2.bias[3] = 1e5
    trunk, _ = tower.split(1)
    message = r"image 0 are not finite in torch.float16: the largest is 1e\+05. Pass `dtype=torch.f"
    with pytest.raises(ValueError, match=message):
        cache_features(trunk, images, tmp_path)
    assert files(tmp_path) == []
    for dtype in (torch.bfloat16, torch.float32):
        cache_features(trunk, images, tmp_path, dtype=dtype)
    with torch.no_grad():
        tower.model.vision_model.encoder.layers[0].mlp.fc2.bias[3] = torch.nan
    with pytest.raises(
        ValueError, match=r"not finite, whatever the dtype: .* `dtype=torch.float32`"
    ):
        cache_features(trunk, images, tmp_path, dtype=torch.float32)


def test_wrong_arguments(tower, images, tmp_path) -> None:
    trunk, head = tower.split(1)
    for part, name in ((tower, "CLIPTower"), (head, "Head"), (nn.Identity(), "Identity")):
        with pytest.raises(TypeError, match=rf"first part of `tower.split\(k\)`, got {name}"):
            cache_features(part, images, tmp_path)
    with pytest.raises(ValueError, match=r"one of torch.float16, .* got torch.float64"):
        cache_features(trunk, images, tmp_path, dtype=torch.float64)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        cache_features(trunk, images, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="`num_workers` must not be negative, got -1"):
        cache_features(trunk, images, tmp_path, num_workers=-1)
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError, match=r"must be a folder, got the file '.*taken'"):
        cache_features(trunk, images, tmp_path / "taken")
    with pytest.raises(ValueError, match=r"Image 1 \(missing.png\) can't be read"):
        cache_features(trunk, ([images[0][0], "missing.png"], [0, 1]), tmp_path)
    assert files(tmp_path) == ["taken"]


# Damage


def test_a_damaged_or_foreign_file_is_computed_again_aloud(tower, images, tmp_path) -> None:
    trunk, _ = tower.split(1)
    path = cache_features(trunk, images, tmp_path).path
    other = cache_features(trunk, (images[0], [0] * 48), tmp_path).path
    content, foreign = path.read_bytes(), tmp_path / "foreign"
    save_file({"features": torch.zeros(48, 5, 32)}, foreign)
    for damaged, message in (
        (content[:-1], "is damaged"),
        (content + b"x", "is damaged"),
        (content[:100], "is damaged"),
        (b"", "is damaged"),
        (b"\xff" * 64 + content[64:], "is damaged"),
        (foreign.read_bytes(), "was not written by `cache_features`"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            CachedFeatures(path)
        with pytest.warns(UserWarning, match=f"{message}.* computed again") as caught:
            cache_features(trunk, images, tmp_path)
        assert caught[0].filename == __file__
        assert path.read_bytes() == content
    shutil.copy(other, path)
    with pytest.warns(UserWarning, match="has the features of other data. The features are comp"):
        cache_features(trunk, images, tmp_path)
    assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        CachedFeatures(tmp_path / "nothing")


class Deadly(Opaque):
    """Kills the process that reads it from memory, once the file is begun."""

    folder: Path

    def __getitem__(self, index: int) -> Any:
        if index == 40 and list(self.folder.glob(".features-*")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_killed_writer_leaves_no_features(tower, images, tmp_path) -> None:
    trunk, _ = tower.split(1)
    data = Deadly(images[0])
    data.folder = tmp_path
    options = {"batch_size": 4, "dtype": torch.float32}
    assert killed_at(10**6, lambda: cache_features(trunk, data, tmp_path, **options))
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".features-")

    features = cache_features(trunk, Opaque(images[0]), tmp_path, dtype=torch.float32)
    values = torch.stack([features[i][0] for i in range(48)])
    assert_close(values, by_hand(trunk, images[0]), rtol=1e-5, atol=1e-6)
    # It may be another run's that goes on; after a day it is not.
    assert leftover.exists()
    old = time.time() - 25 * 3600
    os.utime(leftover, (old, old))
    features.path.unlink()
    cache_features(trunk, Opaque(images[0]), tmp_path, dtype=torch.float32)
    assert not leftover.exists()


def test_no_damage_is_used(tower, images, tmp_path) -> None:
    trunk, _ = tower.split(1)
    data = (images[0][:3], images[1][:3])
    path = cache_features(trunk, data, tmp_path).path
    content, expected = path.read_bytes(), [row.clone() for row, _ in CachedFeatures(path)]
    chance = random.Random(0)
    for place in [*range(0, 8 * 700, 7), *(chance.randrange(8 * len(content)) for _ in range(99))]:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged|was not written by"):
            list(CachedFeatures(path))
    with pytest.warns(UserWarning, match="The features are computed again"):
        again = cache_features(trunk, data, tmp_path)
    assert path.read_bytes() == content
    assert all(torch.equal(row, other) for (row, _), other in zip(again, expected, strict=True))


def test_labels_of_another_kind_are_damage(tower, images, tmp_path) -> None:
    path = cache_features(tower.split(1)[0], images, tmp_path).path
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"I64"', b'"F64"'))  # of the same bytes
    with pytest.raises(ValueError, match="is damaged: its labels are not a class id for each"):
        CachedFeatures(path)


def test_a_disk_that_is_too_small_is_told_at_once(tower, images, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"full, so|need 0.00 GB, and the disk of .* 0.00 GB f") as e:
        cache_features(tower.split(1)[0], images, tmp_path)
    assert e.value.errno == errno.ENOSPC
    assert files(tmp_path) == []


def test_a_disk_that_fills_leaves_no_file(tower, images, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "small"
    cache.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(cache)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    if mounted:  # another program has taken what was free when the writing began
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    else:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    try:
        with pytest.raises(
            OSError, match=r"The disk of '.*small' is full, so no features"
        ) as caught:
            cache_features(tower.split(1)[0], images, cache, dtype=torch.float32)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.__cause__ is not None
        assert files(cache) == []
    finally:
        if mounted:
            subprocess.run(["umount", str(cache)], check=True)


def test_no_progress_bar_where_the_output_is_no_terminal(tower, images, tmp_path, capfd) -> None:
    cache_features(tower.split(1)[0], images, tmp_path)
    assert capfd.readouterr().err == ""
