"""Line drawings as SVG, coloured by the page's style."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import TRACKED, Density, pair_densities, pair_range
from pairclip.evaluation.wording import as_text
from pairclip.finetuner import History
from pairclip.report.html import Html, element, joined, table
from pairclip.retrieval import METRICS

_WIDTH, _HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 10, 36
_MOST_POINTS = 400


class _Frame(NamedTuple):
    """From values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        return _LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def down(self, y: float) -> float:
        return (
            _HEIGHT
            - _BOTTOM
            - (y - self.y[0]) / (self.y[1] - self.y[0]) * (_HEIGHT - _TOP - _BOTTOM)
        )

    def line(self, xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64]) -> str:
        return "M" + "L".join(
            f"{self.across(x):.1f} {self.down(y):.1f}" for x, y in zip(xs, ys, strict=True)
        )


def pair_histograms(evaluations: dict[str, Evaluation]) -> Html:
    """Densities of the similarities of pairs beside each other, on the same axes."""
    low, high = pair_range(*evaluations.values())
    densities = {when: pair_densities(each) for when, each in evaluations.items()}
    peak = max(float(kind.heights.max()) for each in densities.values() for kind in each.values())
    frame = _Frame((low, high), (0, 1.05 * peak))
    legend = element(
        "p",
        _key("same", "same class"),
        _key("different", "different classes"),
        _key("threshold", "best threshold"),
        class_="legend",
    )
    charts = [
        _histogram(when, evaluation, densities[when], frame)
        for when, evaluation in evaluations.items()
    ]
    return joined(legend, element("div", *charts, class_="beside"))


def training(history: History) -> Html:
    """The loss of each step, and the metrics of the evaluations between."""
    steps, losses = (
        np.array([record[key] for record in history.steps], dtype=float) for key in ("step", "loss")
    )
    width = math.ceil(len(losses) / _MOST_POINTS)
    # Neighbouring steps are averaged, so that a long run is no heavier than a short one.
    edges = np.arange(0, len(losses), width)
    counts = np.diff([*edges, len(losses)])
    steps, losses = (np.add.reduceat(each, edges) / counts for each in (steps, losses))
    room = 0.05 * float(np.ptp(losses)) or 0.5
    frame = _Frame(
        (float(steps[0]), float(max(steps[-1], steps[0] + 1))),
        (float(losses.min()) - room, float(losses.max()) + room),
    )
    chart = _chart(
        f"Loss of {len(history.steps)} steps, from {losses[0]:.3g} to {losses[-1]:.3g}.",
        element("path", d=frame.line(steps, losses), class_="line same"),
        *_axes(frame, "step", whole=True),
    )
    return element(
        "div",
        element("figure", element("figcaption", "Loss of each step"), chart),
        _evaluations(history) if history.evaluations else None,
        class_="beside",
    )


def _histogram(
    when: str,
    evaluation: Evaluation,
    densities: dict[str, Density],
    frame: _Frame,
) -> Html:
    shapes = []
    for kind, (edges, heights) in densities.items():
        # Each bin from its left to its right end, and down to the axis before and behind them.
        path = frame.line(np.repeat(edges, 2), np.pad(np.repeat(heights, 2), 1))
        shapes += [
            element("path", d=path, class_=f"area {kind}"),
            element("path", d=path, class_=f"line {kind}"),
        ]
    threshold = evaluation.best_threshold
    if frame.x[0] <= threshold <= frame.x[1]:
        x = f"{frame.across(threshold):.1f}"
        shapes.append(
            element("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="line threshold")
        )
    label = (
        f"{when}: pairs of one class have mean similarity {as_text(evaluation.same_mean)} "
        f"(standard deviation {as_text(evaluation.same_std)}), pairs of different classes "
        f"{as_text(evaluation.different_mean)} ({as_text(evaluation.different_std)}); "
        f"best threshold {as_text(threshold)}."
    )
    chart = _chart(label, *shapes, *_axes(frame, "cosine similarity of two images"))
    return element("figure", element("figcaption", when), chart)


def _chart(label: str, *shapes: Html) -> Html:
    return element(
        "svg",
        *shapes,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label,
        class_="chart",
    )


def _axes(frame: _Frame, title: str, *, whole: bool = False) -> list[Html]:
    """A base line with round values, or whole ones alone, and the name of the axis."""
    floor = _HEIGHT - _BOTTOM
    marks = [
        element("text", text, x=f"{frame.across(x):.1f}", y=floor + 15, class_="tick")
        for x, text in _round_values(*frame.x, whole=whole)
    ]
    base = element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=floor, y2=floor, class_="axis")
    heights = [
        element("text", text, x=_LEFT - 5, y=f"{frame.down(y) + 4:.1f}", class_="height")
        for y, text in _round_values(*frame.y)
    ]
    name = element("text", title, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 3, class_="tick")
    return [base, *marks, *heights, name]


def _round_values(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """Four to ten round numbers between two ends, with as many digits each; few whole ones."""
    exponent = math.floor(math.log10(high - low))
    for exponent_of_step, part in ((exponent, 1), (exponent - 1, 5), (exponent - 1, 2)):
        if whole and exponent_of_step < 0:
            break
        step, digits = part * 10.0**exponent_of_step, max(0, -exponent_of_step)
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first >= 3:
            break
    return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]


def _key(kind: str, text: str) -> Html:
    line = element("line", x1=1, x2=25, y1=6, y2=6, class_=f"line {kind}")
    swatch = element("svg", line, viewBox="0 0 26 12", aria_hidden="true")
    return element("span", swatch, " ", text)


def _evaluations(history: History) -> Html:
    return table(
        "Evaluations during training",
        ["step", *(METRICS[key].title for key in TRACKED)],
        [
            [str(record["step"]), *(as_text(record.get(key)) for key in TRACKED)]
            for record in history.evaluations
        ],
    )
