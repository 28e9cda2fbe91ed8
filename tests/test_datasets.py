"""Datasets of every kind, and what is wrong with some of them."""

import pickle
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import CIFAR10, FakeData, ImageFolder

from pairclip import LabelledImages, class_names_of, labels_of
from pairclip.datasets import as_rgb


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(["ant", "bee", "ant", "cat", "bee"]):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    return tmp_path


class Undecodable(Dataset[Any]):
    """Tells its labels, and fails when an image is asked for."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("decoded an image")


@pytest.mark.parametrize("name", ["targets", "labels", "_labels"])
@pytest.mark.parametrize("values", [[2, 0, 2], np.array([2, 0, 2]), torch.tensor([2, 0, 2])])
def test_labels_come_without_decoding(name: str, values: Any) -> None:
    dataset = Undecodable(**{name: values})
    assert labels_of(dataset).tolist() == [2, 0, 2]
    assert labels_of(Subset(dataset, [1, 2])).tolist() == [0, 2]
    assert labels_of(ConcatDataset([dataset, dataset])).tolist() == [2, 0, 2, 2, 0, 2]
    assert labels_of(dataset).dtype == torch.int64


def test_image_folders_subsets_and_joins(folder: Path) -> None:
    images = ImageFolder(folder)
    assert labels_of(images).tolist() == [0, 0, 1, 1, 2]
    assert class_names_of(images) == ["ant", "bee", "cat"]
    part = Subset(images, [4, 0])
    joined = ConcatDataset([part, Subset(images, [3])])
    assert labels_of(joined).tolist() == [2, 0, 1]
    assert class_names_of(joined) == ["ant", "bee", "cat"]
    data = LabelledImages(joined)
    assert len(data) == 3
    assert [data[i][1] for i in range(3)] == [2, 0, 1]
    assert [data[i][0].getpixel((0, 0))[0] for i in range(3)] == [3, 0, 4]
    assert LabelledImages(data).labels.equal(data.labels)
    with pytest.raises(IndexError, match=r"`index` must be in \[0, 3\), got 3"):
        data[3]


def test_a_torchvision_dataset_tells_its_labels(tmp_path: Path) -> None:
    cifar = CIFAR10.__new__(CIFAR10)
    cifar.data = np.zeros((2, 32, 32, 3), np.uint8)
    cifar.targets, cifar.classes = [9, 3], [f"class {i}" for i in range(10)]
    cifar.transform = cifar.target_transform = None
    data = LabelledImages(cifar)
    assert data.labels.tolist() == [9, 3]
    assert data.class_names == cifar.classes
    assert data[1][0].size == (32, 32)


def test_hugging_face_datasets(folder: Path) -> None:
    pictures = [str(path) for path in sorted(folder.rglob("*.png"))]
    features = hf.Features(
        {"picture": hf.Image(), "kind": hf.ClassLabel(names=["x", "y"]), "text": hf.Value("string")}
    )
    rows = {"picture": pictures, "kind": [1, 0, 1, 1, 0], "text": ["a"] * 5}
    dataset = hf.Dataset.from_dict(rows, features=features)
    assert labels_of(dataset).tolist() == [1, 0, 1, 1, 0]
    assert class_names_of(dataset) == ["x", "y"]
    image, label = LabelledImages(dataset)[2]
    assert (image.size, label) == ((6, 4), 1)
    words = hf.Dataset.from_dict(
        {"image": pictures, "label": ["dog", "cat", "dog", "dog", "cat"]},
        features=hf.Features({"image": hf.Image(), "label": hf.Value("string")}),
    )
    assert labels_of(words).tolist() == [1, 0, 1, 1, 0]
    assert class_names_of(words) == ["cat", "dog"]
    with pytest.raises(ValueError, match="must have one image and one label column"):
        labels_of(dataset.remove_columns("kind"))


def test_pairs_of_images_and_labels() -> None:
    images = np.zeros((3, 5, 5, 3), np.uint8)
    assert labels_of((images, torch.tensor([4, 2, 4]))).tolist() == [4, 2, 4]
    assert class_names_of((images, [4, 2, 4])) is None
    assert labels_of((list(images), ["b", "a", "b"])).tolist() == [1, 0, 1]
    assert class_names_of((images, np.array(["b", "a", "b"], dtype=object))) == ["a", "b"]


def test_paths_are_opened(folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    assert LabelledImages((paths, [0, 0, 1, 1, 1]))[0][0].size == (6, 4)


def test_a_dataset_that_does_not_tell_is_read_once_and_says_so() -> None:
    dataset = FakeData(size=4, image_size=(3, 8, 8), num_classes=3)
    with pytest.warns(UserWarning, match="FakeData does not tell its labels, so all its 4") as said:
        data = LabelledImages(LabelledImages(dataset))
    assert len(said) == 1
    assert data.labels.tolist() == [int(dataset[i][1]) for i in range(4)]


def test_joined_datasets_are_joined_by_the_names_of_their_classes(folder: Path) -> None:
    one, other = ImageFolder(folder), ImageFolder(folder)
    other.classes = ["wasp", "ant", "cat"]
    joined = LabelledImages(ConcatDataset([one, other]))
    assert joined.class_names == ["ant", "bee", "cat", "wasp"]
    assert joined.labels.tolist() == [0, 0, 1, 1, 2, 3, 3, 0, 0, 2]
    assert [joined[index][1] for index in (4, 5, 9)] == [2, 3, 2]
    nameless = (sorted(folder.rglob("*.png")), [0, 0, 1, 1, 2])
    with pytest.raises(ValueError, match="joined by name, and dataset 1 has none"):
        labels_of(ConcatDataset([one, LabelledImages(nameless)]))


def test_a_corrupt_image_is_named_with_index_and_path(folder: Path) -> None:
    path = folder / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    images = ImageFolder(folder)
    where = images.imgs.index((str(path), 1))
    with pytest.raises(ValueError, match=rf"Image {where} \(.*bee.1\.png\) can't be read"):
        LabelledImages(images)[where]
    part = ConcatDataset([Subset(images, [0]), Subset(images, [where])])
    with pytest.raises(ValueError, match=r"Image 1 \(.*bee.1\.png\) can't be read"):
        LabelledImages(part)[1]
    with pytest.raises(ValueError, match=r"Image 0 \(.*bee.1\.png\) can't be read"):
        LabelledImages(([path], [0]))[0]


class Broken:
    """What torchvision's decoders raise, and no image at all."""

    targets = (0, 1)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 0:
            raise RuntimeError("Input is not a JPEG")
        return None, 1


def test_what_decoders_raise_and_what_is_no_image_is_named_too() -> None:
    data = LabelledImages(Broken())
    with pytest.raises(ValueError, match="Image 0 can't be read: Input is not a JPEG"):
        data[0]
    with pytest.raises(TypeError, match=r"Image 1 can't be read: .*got NoneType"):
        data[1]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (([], []), ValueError, "`dataset` has no images"),
        ((["a", "b"], [0]), ValueError, "one label per image, got 1 labels for 2 images"),
        ((["a", "b"], [0.0, 1.0]), TypeError, "must be integers, got float64"),
        ((["a", "b"], [[0, 1], [1, 0]]), ValueError, "Turn one-hot rows into class ids"),
        (7, TypeError, r"must have len\(\) and \[i\]"),
        (Undecodable(targets=[0, 1]), ValueError, "got 2 labels for 3 images"),
    ],
)
def test_wrong_datasets_are_errors(dataset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LabelledImages(dataset)


@pytest.mark.filterwarnings("ignore:list does not tell")
def test_items_must_be_pairs() -> None:
    with pytest.raises(TypeError, match=r"`dataset\[0\]` must be a pair \(image, label\), got int"):
        LabelledImages([1, 2])


def test_images_of_every_kind_become_the_same_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for image in (
        Image.fromarray(picture),
        picture,
        picture.transpose(2, 0, 1),
        tensor,
        tensor.float() / 255,
        picture.astype(np.float64) / 255,
        (tensor.double() / 255).requires_grad_(),
    ):
        np.testing.assert_array_equal(np.asarray(as_rgb(image)), picture)
    grey = picture[..., 0]
    for image in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        np.testing.assert_array_equal(np.asarray(as_rgb(image))[..., 1], grey)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_pictures_of_eight_bits_are_converted_by_pillow(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    through = {"PA": "P", "LAB": "LAB"}.get(mode, mode)
    image = Image.fromarray(noise)
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    else:
        image = image.convert(through).convert(mode)
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))


def test_deep_grey_pictures_keep_their_contrast(tmp_path: Path) -> None:
    deep = np.array([[0, 32896, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for image in (
        Image.open(tmp_path / "deep.png"),
        Image.fromarray(deep.astype(np.int32)),
        Image.fromarray((deep / 65535).astype(np.float32)),
    ):
        assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.full((3, 4, 4), 255.0), ValueError, r"must be in \[0, 1\], got values from 255"),
        (torch.full((3, 4, 4), -0.5), ValueError, "leave normalisation to the tower"),
        (torch.full((3, 4, 4), torch.nan), ValueError, "got values from nan to nan"),
        (np.zeros((0, 4), np.uint8), ValueError, r"must have pixels, got shape \[0, 4\]"),
        (np.zeros((4, 4), np.int64), ValueError, r"must be uint8 in \[0, 255\], got int64"),
        (np.zeros((2, 4, 5), np.uint8), ValueError, r"must have shape .* got \[2, 4, 5\]"),
        (torch.zeros(5, 4, 3), ValueError, r"must have shape .* got \[5, 4, 3\]"),
        (None, TypeError, "must be a PIL image, an array, a tensor or a path, got NoneType"),
        (Image.fromarray(np.array([[-1]], np.int32)), ValueError, "mode 'I' must be in"),
    ],
)
def test_wrong_images_are_errors(image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_rgb(image)


def test_a_float_image_in_0_to_255_is_named_by_its_index() -> None:
    with pytest.raises(ValueError, match=r"Image 1 can't be read: A float image must be in \[0, 1"):
        LabelledImages((torch.tensor([0.0, 200.0]).expand(3, 4, 4, 2).permute(3, 0, 1, 2), [0, 1]))[
            1
        ]


def test_a_target_transform_is_applied_as_items_have_it(folder: Path) -> None:
    images = ImageFolder(folder, target_transform=lambda label: label // 2)
    assert labels_of(images).tolist() == [images[i][1] for i in range(5)] == [0, 0, 0, 0, 1]
    assert class_names_of(images) is None


def test_names_belong_to_the_ids_of_string_labels() -> None:
    dataset = Undecodable(labels=["dog", "cat", "dog"], classes=["dog", "cat"])
    assert labels_of(dataset).tolist() == [1, 0, 1]
    assert class_names_of(dataset) == ["cat", "dog"]
    assert class_names_of(Undecodable(targets=[0, 1, 0], classes=2)) is None
    with pytest.warns(UserWarning, match=r"`classes` of Undecodable has 2 names, .* from 0 to 2"):
        assert class_names_of(Undecodable(targets=[0, 2, 1], classes=["cat", "dog"])) is None


def test_a_subset_that_changes_its_items_is_asked_for_them(folder: Path) -> None:
    class White(Subset):
        def __getitem__(self, index: int) -> Any:
            return Image.new("RGB", (2, 2), "white"), 7

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    dataset = White(ImageFolder(folder), [0, 1])
    with pytest.warns(UserWarning, match="White does not tell its labels"):
        data = LabelledImages(dataset)
    assert data[0][0].getpixel((0, 0)) == (255, 255, 255)
    assert data.labels.tolist() == [7, 7]


def test_columns_of_a_shuffled_frame_go_together(folder: Path) -> None:
    paths = [str(path) for path in sorted(folder.rglob("*.png"))]
    frame = pandas.DataFrame({"path": paths, "label": [Path(path).parent.name for path in paths]})
    frame = frame.sample(frac=1, random_state=0)
    data = LabelledImages((frame.path, frame.label))
    for index, path in enumerate(frame.path):
        with Image.open(path) as image:
            assert data[index][0].getpixel((0, 0)) == image.getpixel((0, 0))
        assert data.class_names is not None
        assert data.class_names[data[index][1]] == Path(path).parent.name


def test_negative_indices_of_a_subset_count_from_the_end(folder: Path) -> None:
    images = ImageFolder(folder)
    dataset = Subset(ConcatDataset([Subset(images, [0, 1]), Subset(images, [2, 4])]), [-1])
    image, label = LabelledImages(dataset)[0]
    assert (image.getpixel((0, 0)), label) == (images[4][0].getpixel((0, 0)), images[4][1])


def test_labels_share_no_memory_with_the_dataset() -> None:
    given = np.array([1, 2, 3])
    labels = labels_of((["a", "b", "c"], given))
    labels += 5
    assert given.tolist() == [1, 2, 3]
    given.flags.writeable = False
    assert labels_of((["a", "b", "c"], given[::-1])).tolist() == [3, 2, 1]


def test_several_datasets_at_once_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got several under \['train', 'test'\]"):
        labels_of({"train": [], "test": []})


def test_it_can_be_sent_to_a_worker(folder: Path) -> None:
    data = pickle.loads(pickle.dumps(LabelledImages(Subset(ImageFolder(folder), [4, 0]))))
    assert data[0][1] == 2


def test_a_subset_of_an_opened_pair_may_be_its_first_two() -> None:
    images = LabelledImages((list(np.zeros((4, 8, 8, 3), np.uint8)), [0, 0, 1, 1]))
    assert LabelledImages(Subset(images, [1, 0])).labels.tolist() == [0, 0]
