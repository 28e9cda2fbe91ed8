"""Embeddings of datasets and of images alone, against the tower itself."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision import transforms

from pairclip import (
    ImageIndex,
    LabelledImages,
    VisionTower,
    embed_images,
    evaluate,
    load_tower,
    occlusion_saliency,
)


def by_hand(tower: VisionTower, pictures: np.ndarray) -> torch.Tensor:
    pixels = torch.stack([tower.preprocess(Image.fromarray(picture)) for picture in pictures])
    with torch.no_grad():
        return tower.eval()(pixels)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_embeddings_are_those_of_the_tower(tower, images, batch_size, num_workers) -> None:
    found = embed_images(tower, images, batch_size=batch_size, num_workers=num_workers)
    assert_close(found, by_hand(tower, images[0]), atol=1e-6, rtol=1e-5)
    assert found.dtype == torch.float32
    assert not found.is_inference()


def test_images_alone_may_be_a_list_an_array_or_a_tensor(tower, images) -> None:
    pictures = images[0][:6]
    expected = embed_images(tower, (pictures, [0] * 6))
    for alone in (
        pictures,
        list(pictures),
        [Image.fromarray(picture) for picture in pictures],
        torch.from_numpy(pictures).permute(0, 3, 1, 2),
    ):
        assert_close(embed_images(tower, alone), expected)


def test_modes_are_as_before_and_dropout_is_off(images) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 4))
    tower = load_tower(
        module,
        image_processor=lambda image: (
            torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, :16, :16] / 255.0
        ),
    )
    tower.train()
    module[1].eval()
    module[1].p = 0.5
    first = embed_images(tower, images)
    assert_close(embed_images(tower, images), first)
    assert tower.training
    assert not module[1].training


def test_an_embedding_that_is_not_finite_is_named(tower, images) -> None:
    with torch.no_grad():
        tower.model.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="`embeddings` has NaN or infinite values in 48 of 48"):
        embed_images(tower, images)


def test_wrong_arguments_are_named(tower, images) -> None:
    with pytest.raises(ValueError, match="`dataset` has no images"):
        embed_images(tower, [])
    with pytest.raises(TypeError, match=r"a list of images, got the path 'a\.png'"):
        embed_images(tower, "a.png")
    with pytest.raises(ValueError, match=r"Image 1 \(missing.png\) can't be read"):
        embed_images(tower, [images[0][0], "missing.png"])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        embed_images(tower, images, batch_size=0)
    for wrong, error in ((-1, ValueError), (None, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="`num_workers` must"):
            embed_images(tower, images, num_workers=wrong)


def test_the_global_generator_is_left_alone(tower, images) -> None:
    state = torch.get_rng_state()
    embed_images(tower, images)
    assert torch.get_rng_state().equal(state)


def test_no_progress_bar_where_the_output_is_no_terminal(tower, images, capfd) -> None:
    embed_images(tower, images)
    assert capfd.readouterr().err == ""


def test_the_result_goes_where_it_is_wanted(tower, images, tmp_path) -> None:
    expected = embed_images(tower, images)
    assert not expected.is_inference()
    out = torch.zeros(48, 12)
    assert embed_images(tower, images, out=out, batch_size=7).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    mapped = np.memmap(tmp_path / "file", np.float32, "w+", shape=(48, 12))
    embed_images(tower, images, out=mapped)
    assert np.array_equal(mapped, expected.numpy())


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ([0.0], TypeError, "`out` must be a tensor or an array that can be written to, got list"),
        (np.broadcast_to(np.float32(0), (48, 12)), TypeError, "can be written to, got ndarray"),
        (np.zeros((48, 12), ">f4"), ValueError, "`out` can't be shared with PyTorch: .*byte order"),
        (np.zeros((48, 12), np.float32)[::-1], ValueError, "`out` can't be shared with PyTorch"),
        (np.zeros((48, 12), np.float16), ValueError, "`out` must be float32 on the CPU"),
        (torch.zeros(48, 12).double(), ValueError, "`out` must be float32 on the CPU"),
        (torch.zeros(47, 12), ValueError, r"row for each of the 48 images, got shape \[47, 12\]"),
        (torch.zeros(12, 48).T, ValueError, "`out` must be contiguous"),
        (torch.zeros(48, 11), ValueError, r"`out` must have shape \[48, 12\].*got \[48, 11\]"),
    ],
)
def test_places_that_do_not_fit(tower, images, out, error, message) -> None:
    with pytest.raises(error, match=message):
        embed_images(tower, images, out=out)


def test_precision_is_that_of_the_tower_and_not_of_somebodys_autocast(tower, images) -> None:
    expected = embed_images(tower, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed_images(tower, images), expected)
    half = embed_images(tower, images, precision="bf16")
    assert half.dtype == torch.float32
    assert not torch.equal(half, expected)
    torch.testing.assert_close(half, expected, atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="`precision` 'fp16' needs a GPU, got the CPU"):
        embed_images(tower, images, precision="fp16")
    with pytest.raises(ValueError, match="`precision` must be one of 'auto', 'no', 'bf16', 'fp16'"):
        embed_images(tower, images, precision="half")


def test_pixel_values_computed_on_the_device_are_those_of_the_image_processor(tower) -> None:
    generator = np.random.default_rng(0)
    sizes = [(16, 16), (40, 23), (9, 30), (40, 23), (333, 250)]
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    given = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    pixels = tower.preprocess.on_device(given, torch.device("cpu"))
    expected = [tower.preprocess(Image.fromarray(picture)) for picture in pictures]
    assert torch.equal(pixels, torch.stack(expected))
    for num_workers in (0, 1):
        options = {"batch_size": 2, "num_workers": num_workers}
        embedded = embed_images(tower, pictures, on_device=True, **options)
        assert torch.equal(embedded, embed_images(tower, pictures, batch_size=2))


def test_images_in_memory_go_to_the_device_as_they_are(tower, images, monkeypatch) -> None:
    expected = embed_images(tower, images, batch_size=7)
    pictures = images[0]
    grey = np.stack([picture[..., 0] for picture in pictures])
    expected_of_grey = embed_images(tower, grey[..., None], batch_size=7)
    assert torch.equal(
        embed_images(tower, grey[..., None], batch_size=7, on_device=True), expected_of_grey
    )
    backwards = embed_images(tower, pictures[::-1], batch_size=7)
    assert torch.equal(embed_images(tower, pictures[::-1], batch_size=7, on_device=True), backwards)
    monkeypatch.setattr(LabelledImages, "__getitem__", None)
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    for given in (pictures, tensor, images):
        assert torch.equal(embed_images(tower, given, batch_size=7, on_device=True), expected)


def test_preprocessing_that_has_no_form_on_the_device_is_refused(tower, images) -> None:
    resize = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    plain = load_tower(nn.Flatten(), image_processor=resize)
    with pytest.raises(ValueError, match="`on_device` needs an image processor of transformers"):
        embed_images(plain, images, on_device=True)
    _, head = tower.split(1)
    with pytest.raises(ValueError, match="`on_device` is for images, and this is a part of"):
        embed_images(head, images, on_device=True)
    # A device that computes something else, as a GPU may.
    true = type(tower.preprocess).on_device
    tower.preprocess.on_device = lambda images, device: (
        true(tower.preprocess, images, device) + 2.5 / 255 / 0.27
    )
    with pytest.raises(ValueError, match=r"on cpu they are off by 2\.\d of 256 levels"):
        embed_images(tower, images, on_device=True)


@pytest.mark.parametrize("tower", [None, "openai/clip", torch.nn.Linear(3, 3)])
@pytest.mark.parametrize(
    "use",
    [
        lambda tower, images: embed_images(tower, images),
        lambda tower, images: evaluate(tower, (images, [0, 0, 1, 1])),
        lambda tower, images: ImageIndex.build(tower, images),
        lambda tower, images: occlusion_saliency(tower, images[0], images[1]),
    ],
)
def test_what_is_no_tower_is_named(use: Any, tower: Any) -> None:
    with pytest.raises(TypeError, match=r"`tower` must be a VisionTower, got .*load_tower"):
        use(tower, np.zeros((4, 16, 16, 3), np.uint8))
