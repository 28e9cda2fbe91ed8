"""Draw where gradient descent on each form of the loss takes four classes on the sphere.

    python docs/figures/linear_minima.py

Writes linear_minima.png beside this file. The same picture comes out each time.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from pairclip import all_pairs_cosine_loss, class_similarity_matrix

NAMES = ["cat", "dog", "car", "truck"]
COLORS = ["#d55e00", "#e69f00", "#0072b2", "#56b4e9"]
PER_CLASS = 8
LABELS = torch.arange(len(NAMES)).repeat_interleave(PER_CLASS)
FORMS = {
    "linear": {"negatives": "linear"},
    "hinge, margin 0.2": {"negatives": "hinge", "margin": 0.2},
    "squared": {"negatives": "squared"},
}


def start() -> Tensor:
    """Two groups 60 degrees apart, of two classes 15 degrees apart: all rather alike."""
    between_groups, within_group = np.radians([30.0, 7.5])
    centres = [
        (group * np.sin(between_groups), member * np.sin(within_group))
        for group in (-1, 1)
        for member in (-1, 1)
    ]
    flat = torch.tensor(centres, dtype=torch.float32)
    up = (1 - flat.square().sum(dim=1, keepdim=True)).sqrt()
    rows = torch.cat([flat, up], dim=1)[LABELS]
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    return normalize(rows + 0.1 * noise, dim=1)


def descend(rows: Tensor, **form: object) -> Tensor:
    """Gradient descent on unit vectors, until nothing moves."""
    for _ in range(3000):
        rows.requires_grad_()
        loss = all_pairs_cosine_loss(rows, LABELS, positive_fraction=0.5, **form)
        (gradient,) = torch.autograd.grad(loss, rows)
        rows = normalize(rows.detach() - 2 * gradient, dim=1)
    return rows


def draw_sphere(figure: Figure, place: SubplotSpec, rows: Tensor, title: str) -> None:
    """Draw the vectors as points on the unit sphere, with a line to each class's mean."""
    axes = figure.add_subplot(place, projection="3d", computed_zorder=False)
    around, along = np.mgrid[0 : 2 * np.pi : 13j, 0 : np.pi : 9j]
    x, y, z = np.cos(around) * np.sin(along), np.sin(around) * np.sin(along), np.cos(along)
    axes.plot_wireframe(x, y, z, color="0.9", linewidth=0.6, zorder=0)
    for number, color in enumerate(COLORS):
        points = rows[number == LABELS].numpy()
        mean = points.mean(axis=0)
        axes.plot(
            *zip((0, 0, 0), mean, strict=True), color=color, linewidth=2.2, zorder=1, clip_on=False
        )
        axes.scatter(
            *points.T, color=color, s=34, depthshade=False, edgecolor="white", linewidth=0.5,
            zorder=2, clip_on=False,
        )  # fmt: skip
    axes.set_box_aspect((1, 1, 1), zoom=1.55)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axes.view_init(elev=22, azim=-75)
    axes.set_axis_off()
    axes.set_title(title, size=13, y=1.03)


def draw_similarity(figure: Figure, place: SubplotSpec, rows: Tensor, *, first: bool) -> None:
    """Draw the mean similarity of the classes, with figures in the cells."""
    axes = figure.add_subplot(place)
    matrix, _ = class_similarity_matrix(rows, LABELS)
    axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(matrix.numpy()):
        dark = abs(value) > 0.55
        axes.text(
            column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center",  # noqa: RUF001
            size=11, color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(NAMES)), NAMES, size=12)
    axes.set_yticks(range(len(NAMES)), NAMES if first else [], size=12)
    axes.tick_params(length=0)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, color in zip(labels, COLORS, strict=False):
            label.set_color(color)
            label.set_weight("bold")
    axes.spines[:].set_visible(False)


def main() -> None:
    """Descend from one start with each form, and draw the four sets of vectors."""
    begin = start()
    columns = {"start": begin} | {
        name: descend(begin.clone(), **form) for name, form in FORMS.items()
    }
    figure = Figure(figsize=(10.4, 5.4), dpi=140)
    grid = figure.add_gridspec(
        2, 4, height_ratios=[1.12, 1], left=0.062, right=0.995, top=0.97, bottom=0.06,
        wspace=0.06, hspace=0.08,
    )  # fmt: skip
    for number, (title, rows) in enumerate(columns.items()):
        draw_sphere(figure, grid[0, number], rows, title)
        draw_similarity(figure, grid[1, number], rows, first=number == 0)
        linear = all_pairs_cosine_loss(rows, LABELS, positive_fraction=0.5)
        matrix, _ = class_similarity_matrix(rows, LABELS)
        print(f"{title}: linear loss {linear:.4f}", matrix.numpy().round(3).tolist())
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path)
    with Image.open(path) as picture:  # a third of the size, and looks alike
        small = picture.convert("RGB").quantize(160, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main()
