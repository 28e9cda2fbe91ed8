"""Pictures: what they show, and that they are legible."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pairclip import (
    History,
    evaluate_embeddings,
    plot_class_similarity,
    plot_history,
    plot_similarity_matrix,
)

HOSTILE = "<b>$\\frac{1}$ & 5%_x</b>"


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def luminance(color: tuple[float, ...]) -> float:
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    return float(np.dot(channels, (0.2126, 0.7152, 0.0722)))


def test_matrix_has_figures_in_its_cells_and_images_on_both_axes(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -0.25, 0.5], [-0.25, 1.0, 0.0], [0.5, 0.0, 1.0]])
    path = tmp_path / "matrix.png"
    figure = plot_similarity_matrix(
        pictures(3), values, title="before", names=["a", "b", HOSTILE], path=path
    )
    cells = figure.axes[0]
    assert [text.get_text() for text in cells.texts] == [
        f"{value:.2f}" for value in values.flatten().tolist()
    ]
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    thumbnails = [array for array in shown if array.shape == (8, 8, 3)]
    assert len(thumbnails) == 6
    for number, picture in enumerate(pictures(3)):
        assert sum(np.array_equal(picture, found) for found in thumbnails) == 2, number
    with Image.open(path) as saved:
        assert saved.width > 400


def test_colours_are_the_same_before_and_after() -> None:
    low = plot_similarity_matrix(pictures(2), torch.full((2, 2), 0.1))
    high = plot_similarity_matrix(pictures(2), torch.full((2, 2), 0.9))
    limits = [figure.axes[0].images[0].get_clim() for figure in (low, high)]
    assert limits == [(-1, 1), (-1, 1)]


def test_figures_are_legible_on_every_colour() -> None:
    values = np.linspace(-1, 1, 36).reshape(6, 6)
    figure = plot_similarity_matrix(pictures(6), values)
    drawn = figure.axes[0].images[0]
    for text, value in zip(figure.axes[0].texts, values.ravel(), strict=True):
        ground = luminance(drawn.cmap(drawn.norm(value)))
        ink = {"white": 1.0, "black": 0.0}[text.get_color()]
        contrast = (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05)
        assert contrast >= 4.5, value


def test_class_matrix_has_names_and_figures(tmp_path: Path) -> None:
    evaluation = evaluate_embeddings(
        torch.randn(30, 4), torch.arange(30) % 3, class_names=["ant", HOSTILE, "c" * 40]
    )
    figure = plot_class_similarity(evaluation, title=HOSTILE, path=tmp_path / "classes.png")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "ant",
        HOSTILE[:17] + "…",
        "c" * 17 + "…",
    ]
    assert axes.get_title() == HOSTILE
    assert axes.texts[0].get_text() == f"{evaluation.class_similarity[0, 0]:.2f}"


@pytest.mark.filterwarnings("ignore:.*queries were left out")
def test_a_class_of_one_image_has_no_similarity_with_itself(tmp_path: Path) -> None:
    evaluation = evaluate_embeddings(torch.randn(5, 4), [0, 0, 1, 1, 2])
    figure = plot_class_similarity(evaluation, path=tmp_path / "classes.png")
    assert figure.axes[0].texts[-1].get_text() == "-"


def test_many_classes_are_drawn_without_figures(tmp_path: Path) -> None:
    evaluation = evaluate_embeddings(torch.randn(400, 4), torch.arange(400) % 200)
    figure = plot_class_similarity(evaluation, path=tmp_path / "classes.png")
    assert len(figure.axes[0].texts) == 0
    with Image.open(tmp_path / "classes.png") as saved:
        assert max(saved.size) < 3000


def test_history_shows_loss_rate_and_evaluations(tmp_path: Path) -> None:
    steps = [{"step": i + 1, "loss": 1 / (i + 1), "learning_rate": 1e-5} for i in range(80)]
    figures = {"recall_at_1": 0.5, "mean_average_precision": 0.4, "gap": None}
    history = History(steps=steps, evaluations=[{"step": 40, **figures}, {"step": 80, **figures}])
    figure = plot_history(history, title="Training", path=tmp_path / "history.png")
    loss, held_out, rate = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [record["loss"] for record in steps])
    assert held_out.lines[0].get_xdata().tolist() == [40, 80]
    assert rate.get_xlabel() == "step"
    smooth = loss.lines[1]
    np.testing.assert_allclose(smooth.get_ydata()[0], np.mean(loss.lines[0].get_ydata()[:3]))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`similarity` must have shape \[3, 3\] for 3 images"):
        plot_similarity_matrix(pictures(3), torch.eye(2))
    with pytest.raises(ValueError, match="`names` must have one name per image, got 1 for 3"):
        plot_similarity_matrix(pictures(3), torch.eye(3), names=["a"])
    with pytest.raises(ValueError, match="`history` must have at least one step"):
        plot_history(History())


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "from pairclip import History, plot_history\n"
        "try:\n"
        "    plot_history(History(steps=[{'step': 1, 'loss': 1.0, 'learning_rate': 1.0}]))\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install pairclip[plot]" in run.stdout
