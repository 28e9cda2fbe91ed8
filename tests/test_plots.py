"""Pictures: what they show, and that they are legible."""

import errno
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pairclip import Evaluation, History, evaluate_embeddings
from pairclip.evaluation.showing import pair_densities, similarity_order, with_clearest_classes
from pairclip.plots import (
    drawing,
    plot_class_similarity,
    plot_history,
    plot_pair_histogram,
    plot_retrieval,
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
        f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in values.flatten().tolist()
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
    figure = plot_class_similarity(
        evaluation, order="given", title=HOSTILE, path=tmp_path / "classes.png"
    )
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "ant",
        HOSTILE[:17] + "…",
        "c" * 17 + "…",
    ]
    assert axes.get_title() == HOSTILE
    value = f"{evaluation.class_similarity[0, 0]:.2f}"
    assert axes.texts[0].get_text() == value.replace("-", "\N{MINUS SIGN}")


@pytest.mark.filterwarnings("ignore:.*queries were left out")
def test_a_class_of_one_image_has_no_similarity_with_itself(tmp_path: Path) -> None:
    evaluation = evaluate_embeddings(torch.randn(5, 4), [0, 0, 1, 1, 2])
    figure = plot_class_similarity(evaluation, order="given", path=tmp_path / "classes.png")
    assert figure.axes[0].texts[-1].get_text() == "-"


def test_many_classes_are_drawn_without_figures(tmp_path: Path) -> None:
    evaluation = evaluate_embeddings(torch.randn(400, 4), torch.arange(400) % 200)
    figure = plot_class_similarity(evaluation, path=tmp_path / "classes.png")
    assert len(figure.axes[0].texts) == 0
    with Image.open(tmp_path / "classes.png") as saved:
        assert max(saved.size) < 3000


def sample(seed: int = 0, spread: float = 1.0) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 4
    rows = torch.eye(4)[labels] + spread * torch.randn(40, 4, generator=generator)
    return evaluate_embeddings(rows, labels, class_names=["ant", "bee", HOSTILE, "dog"])


def test_like_classes_stand_together_in_one_order_before_and_after() -> None:
    before, after = sample(0), sample(1, 0.3)
    order = similarity_order(before.class_similarity)
    assert not np.array_equal(order, np.arange(4))
    for evaluation, figure in [
        (before, plot_class_similarity(before)),
        (after, plot_class_similarity(after, order=before)),
    ]:
        axes = figure.axes[0]
        shown = [label.get_text() for label in axes.get_yticklabels()]
        assert [name[:3] for name in shown] == [before.class_names[i][:3] for i in order]
        np.testing.assert_array_equal(
            axes.images[0].get_array(), evaluation.class_similarity[np.ix_(order, order)]
        )


def test_pairs_are_drawn_as_densities_on_the_same_axes(tmp_path: Path) -> None:
    before, after = sample(0), sample(1, 0.3)
    figure = plot_pair_histogram(before, after, title=HOSTILE, path=tmp_path / "pairs.png")
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim()
    assert first.get_ylim() == second.get_ylim()
    for axes, evaluation in [(first, before), (second, after)]:
        heights, edges, _ = axes.patches[1].get_data()
        assert np.sum(heights * np.diff(edges)) == pytest.approx(1)
        joined = np.histogram(
            evaluation.histogram.edges[:-1] + 1e-9, edges, weights=evaluation.histogram.same
        )[0]
        np.testing.assert_allclose(heights * np.diff(edges), joined / joined.sum())
        assert len(heights) < 30  # of 180 pairs
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        threshold = f"best threshold {evaluation.best_threshold:.2f}".replace("-", "\N{MINUS SIGN}")
        assert names == ["same class", "different classes", threshold]
    low, high = first.get_xlim()
    assert -1.1 < low < high < 1.1


def test_bins_are_the_narrower_the_more_pairs_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    widths = []
    for count in (30, 300, 3000):
        rows, labels = torch.randn(count, 8, generator=generator), torch.arange(count) % 3
        densities = pair_densities(evaluate_embeddings(rows, labels))
        for edges, heights in densities.values():
            assert len(heights) >= 8
            assert np.diff(edges).min() == pytest.approx(np.diff(edges)[0])
            assert np.dot(heights, np.diff(edges)) == pytest.approx(1)
        widths.append(np.diff(densities["same"].edges)[0])
    assert widths[0] > 0.05
    assert widths[2] == pytest.approx(0.01)
    assert widths == sorted(widths, reverse=True)
    collapsed = pair_densities(evaluate_embeddings(torch.ones(4, 2), [0, 0, 1, 1]))
    assert {kind: len(each.heights) for kind, each in collapsed.items()} == {
        "different": 1,
        "same": 1,
    }


@pytest.mark.parametrize("classes", [1, 2, 120])
def test_any_number_of_classes_is_drawn(classes: int, tmp_path: Path) -> None:
    labels = torch.arange(max(6, 2 * classes)) % classes
    evaluation = evaluate_embeddings(torch.randn(len(labels), 4), labels)
    plot_class_similarity(evaluation, path=tmp_path / "classes.png")
    assert len(plot_pair_histogram(evaluation, path=tmp_path / "pairs.png").axes) == 1
    with Image.open(tmp_path / "classes.png") as saved:
        assert max(saved.size) < 3000


def test_neighbours_are_framed_and_marked_right_or_wrong(tmp_path: Path) -> None:
    evaluation = sample()
    figure = plot_retrieval(
        (pictures(40), evaluation.labels),
        evaluation,
        queries=[6, 1],
        k=3,
        title=HOSTILE,
        path=tmp_path / "found.png",
    )
    assert len(figure.axes) == 8
    for row, query in enumerate([6, 1]):
        first, *found = figure.axes[4 * row : 4 * row + 4]
        np.testing.assert_array_equal(first.images[0].get_array(), pictures(40)[query])
        for axes, image in zip(found, evaluation.neighbors[query], strict=False):
            np.testing.assert_array_equal(axes.images[0].get_array(), pictures(40)[image])
            right = evaluation.labels[image] == evaluation.labels[query]
            assert axes.get_title()[0] == ("✓" if right else "✗")
            red, green, *_ = axes.spines["top"].get_edgecolor()
            assert (green > red) == right


def test_long_names_and_titles_have_the_room_there_is(tmp_path: Path) -> None:
    evaluation = sample()
    files = []
    for number, picture in enumerate(pictures(40)):
        files.append(str(tmp_path / f"{number} of the collection.png"))
        Image.fromarray(picture).save(files[-1])
    note = "before fine-tuning: drawings made by a program and a small tower trained on others"
    figure = plot_retrieval((files, evaluation.labels), evaluation, queries=[6], k=3, title=note)
    assert figure.axes[0].get_title().split("\n")[1] == "6 of the collec…"
    values = torch.full((4, 4), -0.5)
    figures = [
        figure,
        plot_similarity_matrix(pictures(4), values, names=["W" * 40, *"abc"], title=note),
        plot_class_similarity(evaluation, title=note),
        plot_pair_histogram(evaluation, title=note),
        plot_history(History([{"step": 1, "loss": 0.5, "learning_rate": 0.1}]), title=note),
    ]
    for drawn in figures:
        drawn.draw_without_rendering()
        (title,) = [
            text for text in drawn.findobj(Text) if note in text.get_text().replace("\n", " ")
        ]
        box = title.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= drawn.bbox.width
        assert 0 <= box.y0 < box.y1 <= drawn.bbox.height


def test_the_classes_take_turns_as_queries() -> None:
    evaluation = sample()
    figure = plot_retrieval((pictures(40), evaluation.labels), evaluation, queries=4, k=1)
    assert [axes.get_title()[:3] for axes in figure.axes[::2]] == ["ant", "bee", "<b>", "dog"]


def test_history_shows_loss_rate_and_evaluations(tmp_path: Path) -> None:
    steps = [{"step": i + 1, "loss": 1 / (i + 1), "learning_rate": 1e-5} for i in range(80)]
    figures = {"recall_at_1": 0.5, "mean_average_precision": 0.4, "gap": None}
    history = History(steps=steps, evaluations=[{"step": 40, **figures}, {"step": 80, **figures}])
    figure = plot_history(history, title="Training", path=tmp_path / "history.png")
    loss, held_out, rate = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [record["loss"] for record in steps])
    assert held_out.lines[0].get_xdata().tolist() == [40, 80]
    assert rate.get_xlabel() == "step"
    for count in (1, 2, 9):
        ticks = plot_history(History(steps[:count])).axes[-1].get_xticks()
        assert all(tick == int(tick) for tick in ticks), ticks
    smooth = loss.lines[1]
    # The mean of three steps stands at the one in the middle.
    assert smooth.get_xdata()[0] == 2
    np.testing.assert_allclose(smooth.get_ydata()[0], np.mean(loss.lines[0].get_ydata()[:3]))
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["each step", "mean of 3 steps around it"]


def test_classes_are_ordered_by_the_evaluation_that_tells_them_apart() -> None:
    flat = evaluate_embeddings(torch.ones(8, 2) + 0.01 * torch.eye(8, 2), torch.arange(8) // 2)
    apart = evaluate_embeddings(torch.eye(4)[torch.arange(8) // 2], torch.arange(8) // 2)
    leaning = evaluate_embeddings(
        torch.eye(2)[torch.arange(8) // 4] + 0.2 * torch.eye(8, 2), torch.arange(8) // 2
    )
    assert with_clearest_classes([flat, leaning]) == 1
    assert with_clearest_classes([leaning, apart]) == 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`similarity` must have shape \[3, 3\] for 3 images"):
        plot_similarity_matrix(pictures(3), torch.eye(2))
    with pytest.raises(ValueError, match="`names` must have one name per image, got 1 for 3"):
        plot_similarity_matrix(pictures(3), torch.eye(3), names=["a"])
    with pytest.raises(ValueError, match="`history` must have at least one step"):
        plot_history(History())
    evaluation = sample()
    data = (pictures(40), evaluation.labels)
    with pytest.raises(ValueError, match="`order` must be one of 'similarity', 'given', got 'x'"):
        plot_class_similarity(evaluation, order="x")
    with pytest.raises(ValueError, match="`order` must be an evaluation of the same classes"):
        plot_class_similarity(evaluation, order=evaluate_embeddings(torch.eye(4), [0, 0, 1, 1]))
    with pytest.raises(ValueError, match="`k` must be at most the 10 neighbours"):
        plot_retrieval(data, evaluation, k=11)
    with pytest.raises(ValueError, match="`queries` must be images that were queries, got 40"):
        plot_retrieval(data, evaluation, queries=[40])
    with pytest.raises(ValueError, match="`queries` must name at least one image"):
        plot_retrieval(data, evaluation, queries=[])
    with pytest.raises(ValueError, match="`dataset` must be the evaluated one, got 39 images"):
        plot_retrieval((pictures(39), evaluation.labels[:39]), evaluation)
    with pytest.raises(ValueError, match="classes of 2 images differ, first of image 0"):
        plot_retrieval((pictures(40), evaluation.labels[[1, 0, *range(2, 40)]]), evaluation)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: plot_class_similarity(torch.eye(2)), "`evaluation` must be an Eval.*, got Tensor"),
        (lambda: plot_pair_histogram([1]), "`before` must be an Evaluation, got list. `evaluate`"),
        (lambda: plot_pair_histogram(sample(), "a"), "`after` must be an Evaluation, got str"),
        (lambda: plot_retrieval(sample(), ()), "`evaluation` must be an Evaluation, got tuple"),
        (lambda: plot_history({}), "`history` must be a History, got dict. `Finetuner.fit` makes"),
        (lambda: sample().changes({}), "`baseline` must be an Evaluation, got dict"),
        (lambda: plot_similarity_matrix(pictures(1), [["a"]]), "`similarity` must be a matrix of"),
        (lambda: plot_similarity_matrix(pictures(1), [[5.0]]), r"must be cosines, .*got 5 to 5"),
        (lambda: plot_similarity_matrix([], []), "`images` must have at least one image"),
        (lambda: plot_similarity_matrix(pictures(1), [[1]], names="a"), "`names` must be a list"),
    ],
)
def test_what_is_no_evaluation_history_or_matrix_is_named(call: Any, problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=problem):
        call()


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


def test_a_picture_is_whole_or_the_old_one(tmp_path: Path, monkeypatch) -> None:
    history = History([{"step": 1, "loss": 0.5, "learning_rate": 0.1, "gradient_norm": None}])
    plot_history(history, path=tmp_path / "a")  # named as matplotlib does
    plot_history(history, path=tmp_path / "a.SVG")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="Format 'abc' is not supported"):
        plot_history(history, path=tmp_path / "a.abc")

    def full(figure: Figure, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"a\.png"):
        plot_history(history, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.SVG", "a.png"]


def test_names_in_any_script_and_undecodable_ones_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = evaluate_embeddings(torch.eye(4), [0, 0, 1, 1], class_names=["c\udc80t", "猫"])
    monkeypatch.setattr(drawing, "east_asian_fonts", lambda: [])
    with pytest.warns(UserWarning, match="no font, and are drawn as boxes") as said:
        figure = plot_class_similarity(evaluation, path=tmp_path / "boxes.png")
    assert len(said) == 1
    assert "c?t" in [label.get_text() for label in figure.axes[0].get_xticklabels()]
    monkeypatch.setattr(drawing, "east_asian_fonts", lambda: ["DejaVu Serif"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # that font has none, either
        figure = plot_class_similarity(evaluation, path=tmp_path / "fonts.png")
    assert "DejaVu Serif" in figure.axes[0].get_xticklabels()[0].get_fontfamily()
