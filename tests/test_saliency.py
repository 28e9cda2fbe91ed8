"""Parts of an image that make it similar, against covering them one by one."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from pairclip import VisionTower, load_tower, occlusion_saliency
from pairclip.evaluation import evaluate_embeddings
from pairclip.evaluation.showing import alike

NOISE = np.random.default_rng(0).integers(0, 256, (2, 22, 31, 3), dtype=np.uint8)


def cosine(tower: VisionTower, one: np.ndarray, other: np.ndarray) -> float:
    with torch.no_grad():
        rows = [
            tower(tower.preprocess(Image.fromarray(each))[None])[0].double()
            for each in (one, other)
        ]
    return float(torch.nn.functional.cosine_similarity(*rows, dim=0))


@pytest.mark.parametrize(("grid", "window"), [(4, 2), (3, 1), (2, 2)])
def test_it_is_the_mean_fall_over_the_windows_that_cover_a_cell(
    grid: int, window: int, tower: VisionTower
) -> None:
    image, other = NOISE
    saliency = occlusion_saliency(tower, image, other, grid=grid, window=window, batch_size=3)
    whole = cosine(tower, image, other)
    falls: dict[tuple[int, int], list[float]] = {}
    rows, columns = ([round(side * i / grid) for i in range(grid + 1)] for side in image.shape[:2])
    for top in range(grid - window + 1):
        for left in range(grid - window + 1):
            covered = image.copy()
            covered[rows[top] : rows[top + window], columns[left] : columns[left + window]] = (
                image.mean(axis=(0, 1)).round()
            )
            fall = whole - cosine(tower, covered, other)
            for row in range(top, top + window):
                for column in range(left, left + window):
                    falls.setdefault((row, column), []).append(fall)
    expected = [[np.mean(falls[row, column]) for column in range(grid)] for row in range(grid)]
    assert saliency.similarity == pytest.approx(whole, abs=1e-6)
    np.testing.assert_allclose(saliency.falls, expected, atol=1e-6)


def test_only_what_the_images_share_counts_and_what_is_cropped_off_does_not() -> None:
    crop = transforms.Compose([transforms.CenterCrop(16), transforms.ToTensor()])
    tower = load_tower(nn.Flatten(), image_processor=crop)
    image, other = (Image.new("RGB", (32, 16), "black") for _ in range(2))
    image.paste("white", (0, 0, 4, 4))  # outside the crop
    image.paste("red", (16, 8, 24, 16))  # in the lower right quarter of it
    other.paste("red", (16, 8, 24, 16))
    falls = occlusion_saliency(tower, image, other, grid=4, window=1).falls
    assert (falls[:, [0, 3]] == 0).all()
    assert falls.argmax() in (10, 14)


def test_what_can_t_be_explained_is_an_error(tower: VisionTower) -> None:
    image = NOISE[0]
    with pytest.raises(ValueError, match="`window` must be at most `grid` 4, got 5"):
        occlusion_saliency(tower, image, image, grid=4, window=5)
    with pytest.raises(ValueError, match="got 64 for 31 x 22"):
        occlusion_saliency(tower, image, image, grid=64)
    with pytest.raises(ValueError, match="`grid` must be"):
        occlusion_saliency(tower, image, image, grid=0)


def test_the_images_shown_are_the_most_similar_of_each_confused_pair_of_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 4
    rows = torch.nn.functional.normalize(torch.randn(24, 6, generator=generator))
    evaluation = evaluate_embeddings(rows, labels, class_names=list("abcd"))
    scores = rows @ rows.T
    pairs = alike(evaluation, 3)
    assert [set(pair.classes) for pair in pairs] == [
        set(each[:2]) for each in evaluation.confused_classes[:3]
    ]
    for pair in pairs:
        one, other = ("abcd".index(name) for name in pair.classes)
        between = scores[labels == one][:, labels == other]
        assert pair.score == pytest.approx(float(between.max()), abs=1e-6)
        assert scores[pair.query, pair.neighbor] == between.max()
        assert (labels[pair.query], labels[pair.neighbor]) == (one, other)
