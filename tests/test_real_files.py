"""A catalogue of real files: what is odd about them, through every way in, and what comes out.

A section for each oddity: orientation, transparency, labels that differ, tuples, missing labels,
classes of several datasets, preprocessing, sixteen bits, folders, forms of labels and datasets,
floats, evaluations, names, relabelling, sizes, memory, and images that can't be read. Odd tables
are in test_tables.py, streams in test_streams.py, odd towers in test_tower_libraries.py.
"""

import argparse
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
import pandas
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset, Subset, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder, OxfordIIITPet
from torchvision.datasets.folder import IMG_EXTENSIONS
from transformers import CLIPImageProcessor

from pairclip import (
    AllPairsCosineLoss,
    Evaluation,
    Finetuner,
    History,
    ImageIndex,
    LabelledImages,
    VisionTower,
    check_collection,
    check_images,
    class_names_of,
    embed_images,
    evaluate,
    labels_of,
    load_tower,
    newest_checkpoint,
)
from pairclip.command import data as command_data, tune
from pairclip.datasets import Problem, as_rgb, image_files, join_classes
from pairclip.embedding import Pixels
from pairclip.finetuner.batches import ItemKey, TrainingItems
from pairclip.finetuner.images import FitImages

# The letter F: another picture whichever way it is turned. Blocks of 8 x 8 survive JPEG.
_F = np.kron(
    np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], np.uint8),
    np.ones((8, 8), np.uint8),
)
F = Image.fromarray(np.where(_F, 60, 220).astype(np.uint8)).convert("RGB")


def ways_in(path: Path) -> dict[str, Callable[[], Image.Image]]:
    """The image of a file, alone in its folder, through every kind of dataset."""
    folder = path.parent.parent
    features = hf.Features({"image": hf.Image(), "label": hf.Value("string")})
    rows = hf.Dataset.from_dict({"image": [str(path)], "label": ["a"]}, features=features)
    in_bytes = hf.Dataset.from_dict(
        {"image": [{"bytes": path.read_bytes(), "path": None}], "label": ["a"]}, features=features
    )
    sources: dict[str, Callable[[], Any]] = {
        "path": lambda: ([path], ["a"]),
        "PIL": lambda: ([Image.open(io.BytesIO(path.read_bytes()))], ["a"]),
        "bytes": lambda: ([path.read_bytes()], ["a"]),
        "folder": lambda: folder,
        "Hugging Face, paths": lambda: rows,
        "Hugging Face, bytes": lambda: in_bytes,
    }
    if path.suffix in IMG_EXTENSIONS:
        flip = transforms.RandomHorizontalFlip(1)
        sources |= {
            "ImageFolder": lambda: ImageFolder(folder),
            "transform": lambda: ImageFolder(folder, transforms.Compose([flip, flip])),
            "Subset": lambda: Subset(ImageFolder(folder), [0]),
        }
    return {
        name: lambda open_=open_: LabelledImages(open_())[0][0] for name, open_ in sources.items()
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "collection" / "a").mkdir(parents=True)
    return tmp_path / "collection" / "a"


def assert_seen(path: Path, expected: Image.Image, *, atol: float = 0) -> None:
    """Every way in shows the expected image."""
    for name, image_of in ways_in(path).items():
        image = image_of()
        assert image.mode == "RGB", name
        assert image.size == expected.size, name
        difference = np.abs(np.asarray(image, float) - np.asarray(expected, float))
        assert difference.max() <= atol, (name, difference.max())


# 1. Orientation


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    """How a camera held in this orientation saves the picture."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = {6: 8, 8: 6}.get(orientation, orientation)
    tagged = picture.copy()
    tagged.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(tagged)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".avif"])
def test_a_photograph_is_upright(place: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {} if suffix in (".png", ".tiff") else {"quality": 95}
    path = place / f"f{suffix}"
    turned(F, orientation).save(path, exif=exif, **options)
    assert_seen(path, F, atol=40 if options else 0)


def test_an_orientation_in_xmp_counts_too(place: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    turned(F, 6).save(place / "f.jpg", xmp=xmp, quality=95)
    assert_seen(place / "f.jpg", F, atol=40)


def test_an_image_is_turned_once(place: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned(F, 6).save(place / "f.png", exif=exif)
    image = LabelledImages(([place / "f.png"], [0]))[0][0]
    again = LabelledImages(LabelledImages(([image], [0])))[0][0]
    np.testing.assert_array_equal(np.asarray(again), np.asarray(F))
    given = Image.open(place / "f.png")
    as_rgb(given)
    assert given.size == turned(F, 6).size  # the caller's image stays as it is


def test_exif_data_that_can_not_be_read_turns_nothing_and_is_said_once(place: Path) -> None:
    for name in ("f.png", "g.png"):
        F.save(place / name, exif=b"Exif\x00\x00no TIFF")
    data = LabelledImages(place.parent)
    with pytest.warns(UserWarning, match=r"Image 0 \(.*f.png\): EXIF data can't be read") as said:
        images = [image for image, _ in (data[0], data[1])]
    assert [image.size for image in images] == [F.size] * 2
    assert len(said) == 1


# 2. Transparency


def black_shape(mode: str) -> Image.Image:
    """A black F on transparent ground, half seen at its foot; all its colours are black."""
    alpha = _F * 255
    alpha[32:] //= 2
    image = Image.fromarray(np.dstack([np.zeros((40, 24, 3), np.uint8), alpha]))
    if mode == "P":
        palette = Image.fromarray(alpha // 127)  # 0, 1 and 2
        palette.putpalette([0] * 768)
        palette.info["transparency"] = bytes([0, 127, 255])
        return palette
    return image.convert(mode)


ON_WHITE = Image.fromarray(255 - np.repeat(np.asarray(black_shape("RGBA"))[..., 3:], 3, axis=2))


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGBA", ".png", {}),
        ("LA", ".png", {}),
        ("P", ".png", {"transparency": bytes([0, 127, 255])}),
        ("RGBA", ".webp", {"lossless": True, "exact": True}),
        ("RGBA", ".tiff", {}),
        ("LA", ".tiff", {}),
        ("RGBA", ".tga", {}),
    ],
)
def test_transparency_shows_a_white_ground(
    place: Path, mode: str, suffix: str, options: dict[str, Any]
) -> None:
    black_shape(mode).save(place / f"shape{suffix}", **options)
    assert_seen(place / f"shape{suffix}", ON_WHITE, atol=1)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", ".png"), ("L", ".png"), ("P", ".png"), ("L", ".gif"), ("P", ".gif")],
)
def test_a_transparent_color_shows_a_white_ground(place: Path, mode: str, suffix: str) -> None:
    grey = Image.fromarray(np.where(_F, 0, 7).astype(np.uint8))
    key: Any = (7, 7, 7) if mode == "RGB" else 7
    image = grey.convert(mode) if mode != "P" else grey
    if mode == "P":
        image.putpalette([value for value in range(256) for _ in range(3)])
    image.save(place / f"shape{suffix}", transparency=key)
    expected = Image.fromarray(np.where(_F, 0, 255).astype(np.uint8)).convert("RGB")
    assert_seen(place / f"shape{suffix}", expected)


def test_transparent_arrays_show_a_white_ground() -> None:
    array = np.asarray(black_shape("RGBA"))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for image in (array, tensor, tensor.float() / 255, array / 255, black_shape("RGBA")):
        np.testing.assert_array_equal(np.asarray(as_rgb(image)), np.asarray(ON_WHITE))
    for mode in ("LA", "La", "RGBa"):
        image = black_shape("LA" if mode == "La" else "RGBA").convert(mode)
        difference = np.abs(np.asarray(as_rgb(image), int) - np.asarray(ON_WHITE, int))
        assert difference.max() <= 1, mode


# 3. Labels told and labels of items


def test_labels_that_items_do_not_have_are_an_error(place: Path) -> None:
    F.save(place / "1.png")
    (place.parent / "b").mkdir()
    for number in range(20):
        F.save(place.parent / "b" / f"{number:2}.png")

    class Mapped(ImageFolder):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return image, 1 - label if index == self.changed else label

    images = Mapped(place.parent)
    images.changed = 20
    with pytest.raises(ValueError, match=r"tells the label 1 of image 20, but its item has 0"):
        LabelledImages(images)
    images.changed = 1  # not among those that are looked at first
    data = LabelledImages(images)
    with pytest.raises(ValueError, match=r"tells the label 1 of image 1, but its item has 0"):
        data[1]
    with pytest.raises(ValueError, match=r"tells the label 1 of image 1, but its item has 0"):
        LabelledImages(images, on_error="skip")
    images.changed = None
    assert LabelledImages(images)[1][1] == 1

    edited = ImageFolder(place.parent)
    edited.samples[3] = (edited.samples[3][0], 0)
    with pytest.raises(ValueError, match=r"label 1 of image 3, but `samples`.* has 0"):
        LabelledImages(edited)
    edited.targets[3] = 0
    assert LabelledImages(edited)[3][1] == 0


def test_pets_with_binary_categories_do_not_train_on_breeds(tmp_path: Path) -> None:
    pets = OxfordIIITPet.__new__(OxfordIIITPet)
    F.save(tmp_path / "pet.jpg")
    pets._images, pets._labels, pets._bin_labels = [tmp_path / "pet.jpg"] * 3, [4, 7, 9], [0, 1, 1]
    pets.transforms = pets.target_transform = None
    pets._target_types = ["binary-category"]
    with pytest.raises(ValueError, match="tells the label 4 of image 0, but its item has 0"):
        LabelledImages(pets)
    pets.targets = pets._bin_labels
    assert LabelledImages(pets)[1][1] == 1


@pytest.mark.parametrize("labels", [[1, 0, 1], torch.tensor([[1], [0], [1]]), ["x", "y", "x"]])
def test_one_label_may_be_written_in_many_ways(labels: Any) -> None:
    class Items:
        targets = labels

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            label = labels[index]
            return F, label if isinstance(label, str) else np.int32(int(label))

    assert LabelledImages(Items())[1][1] == int(labels[0] == "x")


def test_looking_at_labels_draws_nothing_from_the_global_generators(place: Path) -> None:
    class Noisy:
        targets = (0, 1)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return torch.rand(3, 4, 4), index

    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    LabelledImages(Noisy())
    assert torch.rand(2).equal(expected)


# 4. A tuple of length two


@pytest.mark.filterwarnings("ignore:Length of split")
def test_parts_of_a_pair_are_taken_of_what_is_opened() -> None:
    pair = (np.arange(10, dtype=np.uint8).repeat(12).reshape(10, 2, 2, 3), list(range(10)))
    for broken in random_split(pair, [0.8, 0.2]):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"Take it of `LabelledImages\(\(images, labels\)\)`"):
            LabelledImages(broken)
    with pytest.raises(ValueError, match=r"`ConcatDataset` of `\(images, labels\)` has the items"):
        LabelledImages(ConcatDataset([pair, pair]))  # type: ignore[list-item]
    whole = LabelledImages(pair)
    for part in (*random_split(whole, [0.8, 0.2]), ConcatDataset([whole, whole])):
        data = LabelledImages(part)
        assert len(data) == len(part)
        assert all(image.getpixel((0, 0))[0] == label for image, label in data)
    assert labels_of(Subset(pair, [9, 0])).tolist() == [9, 0]  # type: ignore[arg-type]


# 5. Missing labels

NAMES: dict[str, Any] = {
    "NaN in a list": ["b", float("nan"), "a"],
    "None in a list": ["b", None, "a"],
    "an empty name": ["b", "", "a"],
    "an object array": np.array(["b", np.nan, "a"], dtype=object),
    "a column": pandas.Series(["b", None, "a"]),
    "a categorical column": pandas.Series(["b", None, "a"], dtype="category"),
}
NUMBERS: dict[str, Any] = {
    "-1": [1, -1, 0],
    "None in a list of numbers": [1, None, 0],
    "a column of floats": pandas.Series([1, None, 0]),
    "a column of integers": pandas.Series([1, None, 0], dtype="Int64"),
    "a tensor": torch.tensor([1, -1, 0]),
    "floats": np.array([1.0, np.nan, 0.0]),
}


@pytest.mark.parametrize("kind", [*NAMES, *NUMBERS])
def test_a_missing_label_is_no_class(kind: str) -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[2] = 200
    pair = images, {**NAMES, **NUMBERS}[kind]
    with pytest.raises(ValueError, match=r"1 of 3 images have no label .* those at 1\. Leave"):
        LabelledImages(pair)
    with pytest.raises(ValueError, match="have no label"):
        labels_of(pair)
    with pytest.warns(UserWarning, match="1 of 3 images .* are left out, those at 1"):
        data = LabelledImages(pair, drop_missing=True)
    assert data.labels.tolist() == [1, 0]
    assert data.class_names == (["a", "b"] if kind in NAMES else None)
    assert data[1][0].getpixel((0, 0)) == (200, 200, 200)
    assert LabelledImages(data).labels.equal(data.labels)


def test_rows_of_hugging_face_without_a_label_are_told() -> None:
    pictures = [np.full((4, 4, 3), value, np.uint8) for value in (0, 50, 100)]
    for feature, labels in (
        (hf.ClassLabel(names=["x", "y"]), [1, -1, 0]),
        (hf.ClassLabel(names=["x", "y"]), [1, None, 0]),
        (hf.Value("int64"), [1, None, 0]),
        (hf.Value("string"), ["y", None, "x"]),
    ):
        features = hf.Features({"image": hf.Image(), "label": feature})
        dataset = hf.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        with pytest.raises(ValueError, match="1 of 3 images have no label"):
            LabelledImages(dataset)
        with pytest.warns(UserWarning, match="left out, those at 1"):
            data = LabelledImages(dataset, drop_missing=True)
        assert data.labels.tolist() == [1, 0]
        assert data[1][0].getpixel((0, 0)) == (100, 100, 100)


def test_a_dataset_of_which_no_image_has_a_label_is_an_error() -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    with (
        pytest.warns(UserWarning, match="3 of 3"),
        pytest.raises(ValueError, match="`dataset` has no image with a label"),
    ):
        LabelledImages((images, [None] * 3), drop_missing=True)


def test_many_missing_labels_are_counted() -> None:
    images = np.zeros((30, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"29 of 30 .* at 0, 1, 2, 3, 4, 5, 6, 7 and 21 more\."):
        LabelledImages((images, [-1] * 29 + [0]))


# 6. Classes of several datasets


def test_classes_are_joined_by_name() -> None:
    queries = torch.tensor([0, 1, 1]), ["ant", "bee"]
    gallery = torch.tensor([0, 1, 2, -1]), ["bee", "cat", "ant"]
    (one, other), names = join_classes(queries, gallery)
    assert names == ["ant", "bee", "cat"]
    assert one.tolist() == [0, 1, 1]
    assert other.tolist() == [1, 2, 0, -1]
    without = torch.tensor([4, 7]), None
    (one, other), names = join_classes(without, without)
    assert (one.tolist(), other.tolist(), names) == ([4, 7], [4, 7], None)
    with pytest.raises(ValueError, match="joined by name, and dataset 0 has none"):
        join_classes(without, gallery)
    with pytest.raises(ValueError, match="dataset 1 has several that are called 'crane'"):
        join_classes(queries, (torch.tensor([0, 1]), ["crane", "crane"]))


# 7. Preprocessing that can't fit


@pytest.mark.parametrize(
    "settings", [{"do_rescale": False}, {"rescale_factor": 1.0}, {"rescale_factor": 1 / 255**2}]
)
def test_a_processor_that_can_not_fit_eight_bits_is_refused(
    tower: VisionTower, settings: dict[str, Any]
) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16, **settings)
    with pytest.raises(ValueError, match=r"makes pixel values from .* rescale by 1/255, once"):
        load_tower(tower.model, image_processor=processor)


def own_noise(pixels: torch.Tensor) -> torch.Tensor:
    return pixels + float(np.random.default_rng().random())


@pytest.mark.parametrize("change", [transforms.RandomHorizontalFlip(1e-9), own_noise])
def test_random_preprocessing_makes_no_embeddings(change: Any) -> None:
    steps = [transforms.Resize((16, 16)), transforms.ToTensor()]
    steady = load_tower(nn.Flatten(), image_processor=transforms.Compose(steps))
    assert embed_images(steady, [F]).shape == (1, 768)
    drawing = load_tower(nn.Flatten(), image_processor=transforms.Compose([*steps, change]))
    state = torch.get_rng_state()
    for use in (embed_images, evaluate, ImageIndex.build):
        with pytest.raises(ValueError, match="preprocessing draws at random"):
            use(drawing, ([F, F], [0, 0]))
    assert torch.get_rng_state().equal(state)


# 8. Sixteen bits


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_deep_grey_is_scaled_by_the_bits_that_it_holds(place: Path, suffix: str, bits: int) -> None:
    shown = np.array([[0, 17, 128, 255]], np.uint8).repeat(4, axis=0)
    full = 2**bits - 1
    deep = (shown.astype(np.float64) * full / 255).round().astype(np.uint16)
    Image.fromarray(deep).save(place / f"deep{suffix}")
    expected = Image.fromarray(shown).convert("RGB")
    if bits == 16:
        assert_seen(place / f"deep{suffix}", expected)
        return
    for image_of in ways_in(place / f"deep{suffix}").values():
        with pytest.warns(UserWarning, match=rf"from 0 to {full} and is taken to hold {bits}"):
            image = image_of()
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_the_depth_is_said_once_and_black_needs_no_words(place: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(place / "0.png")
    for name in ("1.png", "2.png"):
        Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(place / name)
    data = LabelledImages(place.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data[0][0].getpixel((0, 0)) == (0, 0, 0)
    with pytest.warns(UserWarning, match=r"Image 1 \(.*1.png\)") as said:
        pixels = [data[index][0].getpixel((0, 0)) for index in (1, 2)]
    assert pixels == [(255,) * 3] * 2
    assert len(said) == 1


def png_of_deep_colors(values: np.ndarray) -> bytes:
    """An RGB PNG of 16 bits, which Pillow reads and does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_colors_of_twelve_bits_in_sixteen_are_told(place: Path) -> None:
    path = place / "deep.png"
    path.write_bytes(png_of_deep_colors(np.full((4, 4, 3), 4095)))
    for image_of in ways_in(path).values():
        with pytest.warns(UserWarning, match="holds no more than 12 bits"):
            image_of()
    path.write_bytes(png_of_deep_colors(np.full((4, 4, 3), 65535)))
    assert_seen(path, Image.new("RGB", (4, 4), "white"))


# 9. Folders


@pytest.fixture
def littered(tmp_path: Path) -> Path:
    """Two classes, and what systems and editors leave beside them."""
    root = tmp_path / ".hidden" / "collection"  # what leads to the collection doesn't matter
    for name in (
        *("ant/1.png", "ant/deep/er/2.png", "bee/3.png", "ant/4 .hidden.png"),
        *(".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/ant/1.png", "bee/.thumbnails/3.png"),
        *("ant/._1.png", "bee/@eaDir/3.png"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        F.save(root / name)
    return root


def test_hidden_and_system_entries_do_not_count(littered: Path) -> None:
    expected = ["ant/1.png", "ant/4 .hidden.png", "ant/deep/er/2.png", "bee/3.png"]
    folder = LabelledImages(littered)
    with pytest.warns(
        UserWarning, match="5 files are hidden or in hidden or system folders"
    ) as said:
        images = LabelledImages(ImageFolder(littered))
    assert ".ipynb_checkpoints" in str(said[0].message)
    for data in (folder, images):
        paths = [data.source.path(index) for index in range(len(data))]
        assert sorted(os.path.relpath(str(path), littered) for path in paths) == expected
        assert data.class_names == ["ant", "bee"]
        assert data.labels.tolist() == [0, 0, 0, 1]
        assert [data[index][1] for index in range(4)] == [0, 0, 0, 1]
    assert sorted(image_files(littered)) == sorted(str(littered / name) for name in expected)


def test_a_subset_of_a_littered_folder_has_the_items_that_were_meant(littered: Path) -> None:
    images = ImageFolder(littered)
    wanted = [index for index, (path, _) in enumerate(images.samples) if path.endswith("3.png")]
    with pytest.warns(UserWarning, match="hidden"):
        data = LabelledImages(Subset(images, wanted))
    assert [data.source.path(index) for index in range(len(data))] == [str(littered / "bee/3.png")]
    with pytest.warns(UserWarning, match="hidden"):
        joined = LabelledImages(ConcatDataset([Subset(images, wanted), images]))
    assert joined.labels.tolist() == [1, 0, 0, 0, 1]


def test_links_are_followed_once(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    F.save(elsewhere / "1.png")
    root = tmp_path / "root"
    (root / "ant" / "deep").mkdir(parents=True)
    F.save(root / "ant" / "2.png")
    (root / "ant" / "a first").symlink_to(elsewhere)
    (root / "ant" / "deep" / "loop").symlink_to(root / "ant")
    (root / "bee").symlink_to(elsewhere)
    os.symlink(elsewhere / "1.png", root / "ant" / "linked.png")
    with pytest.warns(UserWarning, match=r"1 linked folders lead .* such as '.*loop'"):
        data = LabelledImages(root)
    names = [os.path.relpath(data.source.path(i), root) for i in range(len(data))]
    assert names == ["ant/2.png", "ant/a first/1.png", "ant/linked.png", "bee/1.png"]


def test_parts_of_a_dataset_are_no_classes(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name / "ant").mkdir(parents=True)
        F.save(tmp_path / name / "ant" / "1.png")
    (tmp_path / "models").mkdir()
    for dataset in (tmp_path, ImageFolder(tmp_path, allow_empty=True)):
        with pytest.raises(ValueError, match=r"has train and val, which are parts .*train'"):
            LabelledImages(dataset)
    assert LabelledImages(tmp_path / "val").class_names == ["ant"]


@pytest.mark.parametrize("test_classes", [["ant", "bee"], ["cow", "dog"]])
def test_the_command_uses_parts_and_says_so(tmp_path: Path, test_classes: list[str]) -> None:
    """The classes of the two may be others, as those of CUB and SOP are."""
    for part, classes in (("train", ["ant", "bee"]), ("val", test_classes), ("test", ["ant"])):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(2):
                F.save(tmp_path / part / name / f"{number}.png")
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    args = parser.parse_args([str(tmp_path), "--output", str(tmp_path / "out")])
    split = command_data.open_split("DATA", tmp_path, args)
    assert split.said == "trained on train, evaluated on test; val is not used"
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    split = command_data.open_split("DATA", tmp_path, args)
    assert split.said == "trained on train, evaluated on val"
    used = [LabelledImages(part) for part in (split.train, split.test)]
    assert [part.class_names for part in used] == [["ant", "bee"], test_classes]
    assert [part.labels.tolist() for part in used] == [[0, 0, 1, 1]] * 2
    # Vehicles: of these two folders one is no part, but a class.
    for name in ("bus", "train"):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        F.save(tmp_path / "vehicles" / name / "1.png")
    (whole,) = command_data.open_parts("DATA", tmp_path / "vehicles", args).values()
    assert whole.class_names == ["bus", "train"]


def test_what_a_folder_has_besides_is_said(place: Path) -> None:
    F.save(place / "1.png")
    F.save(place.parent / "beside.png")
    (place.parent / "README.md").write_text("")
    (place.parent / "empty").mkdir()
    with pytest.warns(UserWarning, match=r"1 images beside .* the folders \['empty'\]"):
        assert LabelledImages(place.parent).class_names == ["a"]
    with pytest.raises(FileNotFoundError, match="must be a folder with a folder for each class"):
        LabelledImages(place.parent / "missing")
    with pytest.raises(ValueError, match="has no folders of images"):
        LabelledImages(place)
    with pytest.raises(NotADirectoryError, match="`folder` must be a folder of images"):
        image_files(place / "1.png")


# 10. Forms of datasets and labels


class Kind(str, Enum):
    FIRST = "ant"
    SECOND = "bee"


class Number(IntEnum):
    FIRST = 0
    SECOND = 1


def works(labels: Any) -> list[int]:
    return labels_of(([F] * 3, labels)).tolist()


def test_labels_may_have_many_forms() -> None:
    for labels in (
        [[1], [0], [1]],
        np.array([[1], [0], [1]]),
        torch.tensor([[1], [0], [1]]),
        np.array([1, 0, 1], dtype=object),
        pandas.Series([1, 0, 1], index=[5, 6, 7]),
        [torch.tensor(1), torch.tensor(0), torch.tensor(1)],
        [np.int8(1), 0, True],
        np.array([True, False, True]),
        np.array([1, 0, 1], np.uint64),
        ["b", "a", "b"],
        np.array(["b", "a", "b"]),
        np.array([b"b", b"a", b"b"]),
        pandas.Series(["b", "a", "b"], dtype="category"),
        [np.str_("b"), "a", "b"],
        [Kind.SECOND, Kind.FIRST, Kind.SECOND],
        [Number.SECOND, Number.FIRST, Number.SECOND],
        ["é".encode(), b"a", "é".encode()],
        np.array(["é".encode(), b"a", "é".encode()]),
    ):
        assert works(labels) == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([[0, 1], [1, 0], [0, 1]], ValueError, r"one-hot rows into class ids .*argmax\(1\)"),
        ([[1, 1], [1, 0], [0, 1]], ValueError, "rows are not one-hot. An image of several classes"),
        (torch.tensor([[1, 1], [1, 0], [0, 0]]), ValueError, "targets of `TargetSimilarityLoss`"),
        ([[0], [1, 2], [0]], ValueError, "lists of different lengths, from 1 to 2"),
        ([1, "cat", 2], TypeError, "all integers or all names, got int, str"),
        ([("a", "b")] * 3, ValueError, r"such as \('a', 'b'\). Join the parts of a name"),
        ([0.5, 1.0, 2.0], TypeError, "must be integers, got float64"),
        ([np.inf, np.nan, 2.0], TypeError, "must be integers, got float64"),
        ([0.5, np.nan, 2.0], TypeError, "must be integers, got float64"),
        ([object()] * 3, TypeError, "all integers or all names, got object"),
        ([10**30, 1, 2], ValueError, "must be integers of 64 bits, got 10000"),
        (np.array([2**63, 1, 2], np.uint64), ValueError, r"below 2\*\*63, got 9223372036854775808"),
        ("aba", TypeError, "one label per image, got str"),
        (iter("aba"), TypeError, "one label per image, got str_ascii_iterator|str_iterator"),
    ],
)
def test_other_labels_have_words_of_their_own(
    labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        works(labels)


def test_an_array_of_paths_is_a_list_of_paths(place: Path) -> None:
    F.save(place / "1.png")
    for paths in (np.array([str(place / "1.png")]), pandas.Series([place / "1.png"], index=[4])):
        data = LabelledImages((paths, ["a"]))
        assert data[0][0].size == F.size
        assert data.source.path(0) == str(place / "1.png")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield F, 0


class Triples:
    targets = (0,)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return F, 0, "metadata"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (pandas.DataFrame({"path": ["a"], "label": [0]}), r"Name its columns: `TableDataset\("),
        ({"train": [], "test": []}, r"got several under \['train', 'test'\]"),
        ({"image": [], "label": []}, r"given as `\(images, labels\)`"),
        (((image, 0) for image in [F]), "the stream generator. Train on it through"),
        (Stream(), "the stream Stream"),
        (hf.Dataset.from_dict({"label": [0]}).to_iterable_dataset(), "the stream IterableDataset"),
        (map(str, [1]), "the stream map"),
    ],
)
def test_what_is_no_map_style_dataset_has_words_of_its_own(dataset: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LabelledImages(dataset)


def test_items_of_three_are_named() -> None:
    data = LabelledImages(Triples())
    with pytest.raises(TypeError, match=r"must be a pair \(image, label\), got tuple of 3"):
        data[0]


def test_a_hugging_face_format_hides_no_column() -> None:
    dataset = hf.Dataset.from_dict({"image": [F, F], "label": [1, 0], "note": ["a", "b"]})
    dataset = dataset.cast_column("image", hf.Image())
    for formatted in (
        dataset.with_format("torch"),
        dataset.with_format("numpy", columns=["label"]),
        dataset.with_format(columns=["note"]),
    ):
        data = LabelledImages(formatted)
        assert data.labels.tolist() == [1, 0]
        assert data[1][0].tobytes() == F.tobytes()
    grey = dataset.with_transform(lambda rows: {"image": [i.convert("L") for i in rows["image"]]})
    assert LabelledImages(grey)[0][0].tobytes() == F.convert("L").convert("RGB").tobytes()
    other = dataset.with_transform(lambda rows: {"pixel_values": rows["image"]})
    with pytest.raises(TypeError, match=r"must give its column 'image', got \['pixel_values'\]"):
        LabelledImages(other)[0]


# 11. Floats


def test_a_little_overshoot_is_clipped_and_said_once() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0], images[1, 0, 0, 0], images[2, 0, 0, 0] = -0.1, 1.1, -0.11
    data = LabelledImages((images, [0, 1, 2]))
    with pytest.warns(UserWarning, match=r"Image 0: A float image has values from -0.1") as said:
        pixels = [data[index][0].getpixel((0, 0))[0] for index in (0, 1)]
    assert pixels == [0, 255]
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"Image 2 can't be read: A float image must be in \[0, 1"):
        data[2]


# 12. What is evaluated during a fit


@pytest.mark.parametrize(
    ("evaluated", "options", "message"),
    [
        (([F, F], [0, 1]), {}, "each alone in its class"),
        (([F, F], [0, None]), {}, "1 of 2 images have no label"),
        (
            (["/1.png", "/2.png"], [0, 0]),
            {},
            r"`eval_dataset` has 2 of 2 .* \(/1\.png: there is no",
        ),
        (([b"GIF", F, F], [0, 0, 0]), {"check": "decode"}, "`eval_dataset` has 1 of 3"),
    ],
)
def test_an_evaluation_that_can_not_be_is_said_before_the_first_step(
    tower: VisionTower, evaluated: Any, options: dict[str, Any], message: str
) -> None:
    weights = [parameter.clone() for parameter in tower.parameters()]
    with pytest.raises(ValueError, match=message):
        Finetuner(tower, AllPairsCosineLoss()).fit(
            ([F] * 4, [0, 0, 1, 1]), batch_size=4, eval_dataset=evaluated, **options
        )
    assert all(map(torch.equal, weights, tower.parameters()))


# 13 and 18. Names


def test_names_that_are_no_utf8_are_written_and_read_again(
    tmp_path: Path, tower: VisionTower
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    images = folder / "images"
    for name in (b"cr\xe8me", "\u732b".encode()):
        (images / os.fsdecode(name)).mkdir(parents=True)
        for number in range(3):
            values = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(values).save(images / os.fsdecode(name) / f"{number}.png")
    names = ["cr\udce8me", "\u732b"]
    for dataset in (images, ImageFolder(images)):
        data = LabelledImages(dataset)
        assert sorted(data.class_names or []) == sorted(names)
        evaluation = evaluate(tower, data)
        evaluation.to_json(folder / "evaluation.json")
        assert Evaluation.from_json(folder / "evaluation.json").class_names == data.class_names
        index = ImageIndex.build(tower, data)
        index.save(folder / f"index {type(dataset).__name__}")
        again = ImageIndex.load(folder / f"index {type(dataset).__name__}", tower=tower)
        assert (again.paths, again.class_names) == (index.paths, data.class_names)
        assert all(os.path.exists(str(path)) for path in again.paths)
    options: dict[str, Any] = {"batch_size": 4, "checkpoint_dir": folder / "run"}
    Finetuner(tower, AllPairsCosineLoss()).fit(images, max_steps=2, **options)
    assert newest_checkpoint(folder / "run") is not None
    finished = Finetuner(tower, AllPairsCosineLoss()).fit(
        images, max_steps=2, resume=True, **options
    )
    assert len(finished.steps) == 2


# 14. Relabelling


def test_classes_of_a_subset_are_numbered_from_zero() -> None:
    images = np.zeros((4, 4, 4, 3), np.uint8)
    whole = LabelledImages((images, ["d", "c", "b", "d"]))
    data = LabelledImages(Subset(whole, [0, 1, 3]), relabel=True)
    assert data.labels.tolist() == [1, 0, 1]
    assert data.class_names == ["c", "d"]
    assert [data[index][1] for index in range(3)] == [1, 0, 1]
    assert LabelledImages(data).labels.tolist() == [1, 0, 1]
    assert class_names_of(data) == ["c", "d"]
    numbers = LabelledImages((images, [7, 3, 3, 9]), relabel=True)
    assert (numbers.labels.tolist(), numbers.class_names) == ([1, 0, 0, 2], None)


# 16. More asked for than there is


def test_what_is_more_than_there_is_takes_what_there_is(tower: VisionTower) -> None:
    images = [F, F, F.rotate(90), F.rotate(90)]
    with pytest.warns(UserWarning, match="more than `dataset` can fill with its 4 images"):
        Finetuner(tower, AllPairsCosineLoss()).fit((images, [0, 0, 1, 1]), max_steps=1)
    assert len(ImageIndex.build(tower, (images, [0, 0, 1, 1])).search(F, k=9)) == 4


# 17. Memory


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_an_image_that_resizing_would_blow_up_is_named(place: Path, size: tuple[int, int]) -> None:
    Image.new("L", size).save(place / "line.png")
    for image_of in ways_in(place / "line.png").values():
        with pytest.raises(ValueError, match=r"Image 0 .*can't be read: An image of .*Crop it"):
            image_of()
    with pytest.raises(ValueError, match="would take too much memory when its shorter side"):
        as_rgb(np.zeros((*size, 3), np.uint8))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_named_before_it_is_decoded(place: Path) -> None:
    path = place / "bomb.png"
    content = bytearray(png_of_deep_colors(np.zeros((1, 1, 3))))
    content[16:24] = struct.pack(">II", 11_000, 11_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"11,000 x 11,000 pixels would take too much memory"):
        LabelledImages(([path], [0]))[0]


def test_a_pipe_is_named_and_waits_for_nobody(place: Path) -> None:
    os.mkfifo(place / "pipe.png")
    F.save(place / "1.png")
    with pytest.raises(ValueError, match=r"pipe\.png' is not a regular file"):
        LabelledImages(([place / "pipe.png"], [0]))[0]
    with pytest.raises(ValueError, match=r"pipe\.png' is not a regular file"):
        LabelledImages(ImageFolder(place.parent))[1]
    assert len(LabelledImages(place.parent)) == 1


def test_drafts_are_smaller_and_nearly_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse.resize((3200, 2400), Image.Resampling.BICUBIC).save(place / "photo.jpg", quality=95)
    exact = LabelledImages(place.parent)[0][0].resize((224, 168), Image.Resampling.BICUBIC)
    for draft_decode, size in ((True, (1600, 1200)), (300, (400, 300)), (False, (3200, 2400))):
        data = LabelledImages(place.parent, draft_decode=draft_decode)
        for view in (data, Subset(data, [0]), ConcatDataset([data, data])):
            assert LabelledImages(view)[0][0].size == size
        small = data[0][0].resize((224, 168), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(small, float) - np.asarray(exact, float))
        assert difference.mean() < 1
    # What only a draft can read is no image to skip.
    monkeypatch.setattr("pairclip.datasets.reading._MOST_PIXELS", 1_000_000)
    assert check_images(LabelledImages(place.parent, draft_decode=300)) == []
    assert len(LabelledImages(place.parent, draft_decode=300, on_error="skip")) == 1
    with pytest.raises(ValueError, match="`draft_decode` must be at least 1, got 0"):
        LabelledImages(place.parent, draft_decode=0)


def test_a_tower_sees_what_a_person_sees(place: Path, tower: VisionTower) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned(F, 6).save(place / "f.png", exif=exif)
    black_shape("RGBA").save(place / "shape.png")
    for path, seen in ((place / "f.png", F), (place / "shape.png", ON_WHITE)):
        expected = tower.preprocess(seen)
        for image in (Image.open(path), LabelledImages(([path], [0]))[0][0]):
            assert tower.preprocess(image).equal(expected)
        assert embed_images(tower, [path]).equal(embed_images(tower, [seen]))


@pytest.mark.parametrize("kind", ["embedding", "training"])
def test_large_images_of_a_batch_are_held_one_at_a_time(tower: VisionTower, kind: str) -> None:
    events: list[str] = []

    class Photographs(list[Any]):
        def __getitem__(self, index: Any) -> Image.Image:
            events.append("read")
            return Image.new("RGB", (1000, 1000))

    class Recorded(type(tower.preprocess.transform)):  # type: ignore[misc]
        def __call__(self, images: Any, **options: Any) -> Any:
            events.append(f"preprocess {len(images)}")
            return super().__call__(images=images, **options)

    tower.preprocess.transform = Recorded.from_dict(tower.preprocess.transform.to_dict())
    data = LabelledImages((Photographs([None] * 3), [0, 1, 2]))
    if kind == "embedding":
        values = Pixels(data, tower.preprocess).__getitems__([0, 1, 2])
        assert len(values) == 3
    else:
        items = TrainingItems(FitImages(data, None), tower.preprocess, seed=0)
        loaded = items.__getitems__([ItemKey(0, i, i) for i in (2, 0, 1)])
        assert [label for _, label, _ in loaded] == [2, 0, 1]
    assert events == ["read", "preprocess 1"] * 3


# Unreadable images


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Two classes of three images; the second of the first and all of a third are damaged."""
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
        for number in range(3):
            path = tmp_path / name / f"{number}.png"
            F.save(path)
            if name == "cat" or (name, number) == ("ant", 1):
                path.write_bytes(path.read_bytes()[:-40] if number else b"no image")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_can_not_be_read_are_listed(damaged: Path, num_workers: int) -> None:
    problems = check_images(damaged, num_workers=num_workers)
    assert [problem.index for problem in problems] == [1, 6, 7, 8]
    assert problems[0].path == str(damaged / "ant" / "1.png")
    assert "truncated" in problems[0].reason
    assert "cannot identify image file" in problems[1].reason
    assert check_images(Subset(ImageFolder(damaged), [0, 2])) == []


def test_an_image_that_can_not_be_made_is_listed_like_one_that_can_not_be_read() -> None:
    class Made(list[Any]):
        def __getitem__(self, index: Any) -> Image.Image:
            if index == 1:
                raise OSError("no such plate")
            return F

    images = (Made([None] * 3), ["ant", "bee", "cat"])
    assert check_images(images) == [Problem(1, None, "no such plate")]
    with pytest.warns(UserWarning, match=r"1 of 3 images can't be read .*image 1: no such plate"):
        assert len(LabelledImages(images, on_error="skip")) == 2
    assert check_collection({"all": images}).items[1].problem == "no such plate"


def test_images_that_can_not_be_read_are_left_out_and_counted(damaged: Path) -> None:
    with pytest.raises(ValueError, match=r"Image 1 \(.*1\.png\) can't be read: image file"):
        LabelledImages(damaged)[1]
    with pytest.warns(UserWarning, match=r"4 of 9 images can't be read .* and 1 more\)\.") as said:
        data = LabelledImages(damaged, on_error="skip")
    assert len(said) == 1
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.class_names == ["ant", "bee", "cat"]
    assert [problem.index for problem in data.unreadable] == [1, 6, 7, 8]
    assert LabelledImages(data).unreadable == data.unreadable
    for index in range(5):
        image, label = data[index]
        assert image.size == F.size
        assert Path(str(data.source.path(index))).parent.name == ["ant", "bee"][label]
    assert LabelledImages(damaged).unreadable == []


def test_images_that_were_left_out_are_in_the_results(damaged: Path, tower: VisionTower) -> None:
    with pytest.warns(UserWarning, match="4 of 9 images can't be read"):
        data = LabelledImages(damaged, on_error="skip")
    part = Subset(data, [0, 1, 2, 3])
    assert LabelledImages(ConcatDataset([part, part])).unreadable == data.unreadable * 2
    evaluation = evaluate(tower, part, gallery=data)
    assert evaluation.unreadable == data.unreadable * 2
    evaluation.to_json(damaged / "evaluation.json")
    assert Evaluation.from_json(damaged / "evaluation.json").unreadable == evaluation.unreadable
    assert "unreadable" not in evaluate(tower, ([F] * 4, [0, 0, 1, 1])).to_dict()
    history = Finetuner(tower, AllPairsCosineLoss()).fit(
        part, eval_dataset=data, batch_size=4, max_steps=1
    )
    records = [{"argument": name} for name in ("dataset", "eval_dataset") for _ in range(4)]
    for record, problem in zip(records, data.unreadable * 2, strict=True):
        record |= vars(problem)
    assert history.unreadable == records
    history.to_json(damaged / "history.json")
    assert History.from_json(damaged / "history.json") == history


def test_images_are_left_out_with_other_choices(damaged: Path) -> None:
    paths, labels = image_files(damaged), [5, 5, None, 7, 7, 7, 9, 9, 9]
    with pytest.warns(UserWarning, match="are left out") as said:
        data = LabelledImages((paths, labels), drop_missing=True, relabel=True, on_error="skip")
    assert [str(warning.message)[:6] for warning in said] == ["1 of 9", "4 of 8"]
    assert data.labels.tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="`dataset` has no image that can be read"):
        LabelledImages(Subset(ImageFolder(damaged), [1, 6]), on_error="skip")
    with pytest.raises(ValueError, match="`on_error` must be one of 'raise', 'skip', got 'warn'"):
        LabelledImages(damaged, on_error="warn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_workers` 2 would be ignored"):
        LabelledImages(damaged, num_workers=2)


def test_an_index_error_of_a_damaged_file_does_not_end_a_loop() -> None:
    class Broken(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise IndexError

    with pytest.raises(ValueError, match="Image 0 can't be read: IndexError"):
        list(LabelledImages((Broken([F]), [0])))
