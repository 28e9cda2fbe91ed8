"""Drawings of twelve kinds of things, made by a program: images for where there is no network.

    python examples/offline/drawings.py FOLDER [--per-class 60] [--seed 0]

Ground, size, turn, place and details are random, and so are the colours, within what such things
have. Each drawing follows from (seed, class, number) alone.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TOWER = Path(__file__).parent / "tower"  # the small tower that goes with them
SIDE = 96
_SCALE = 3  # drawn larger and made smaller, which smooths the edges
Color = tuple[int, int, int]


class Pen:
    """Draws in a unit square with a few colours."""

    def __init__(self, side: int, colors: list[Color], rng: np.random.Generator) -> None:
        self.image = Image.new("RGBA", (side, side))
        self.colors, self.rng = colors, rng
        self._draw, self._side = ImageDraw.Draw(self.image), side

    def shape(self, color: int, *points: float) -> None:
        """A polygon through x, y, x, y, ..."""
        self._draw.polygon([self._side * each for each in points], self.colors[color])

    def oval(self, color: int, x: float, y: float, across: float, down: float) -> None:
        """An ellipse around x, y."""
        box = [self._side * each for each in (x - across, y - down, x + across, y + down)]
        self._draw.ellipse(box, self.colors[color])

    def box(self, color: int, left: float, top: float, right: float, bottom: float) -> None:
        """A rectangle."""
        self._draw.rectangle(
            [self._side * each for each in (left, top, right, bottom)], self.colors[color]
        )

    def line(self, color: int, *points: float, width: float = 0.03) -> None:
        """A line through x, y, x, y, ..."""
        self._draw.line(
            [self._side * each for each in points],
            self.colors[color],
            round(self._side * width),
            joint="curve",
        )

    def arc(
        self, color: int, x: float, y: float, radius: float, first: float, last: float, width: float
    ) -> None:
        """A part of a circle around x, y, in degrees."""
        box = [self._side * each for each in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.arc(box, first, last, self.colors[color], round(self._side * width))

    def any(self, low: float, high: float) -> float:
        """A random number between two."""
        return float(self.rng.uniform(low, high))


def house(pen: Pen) -> None:
    """A gabled house."""
    left, top = pen.any(0.12, 0.25), pen.any(0.4, 0.5)
    pen.box(0, left, top, 1 - left, 0.92)
    pen.shape(1, left - 0.09, top, 0.5, pen.any(0.08, 0.2), 1.09 - left, top)
    door = pen.any(0.3, 0.55)
    pen.box(2, door, 0.66, door + 0.15, 0.92)
    for x in (left + 0.06, 1 - left - 0.18):
        pen.box(3, x, top + 0.07, x + 0.12, top + 0.18)


def tree(pen: Pen) -> None:
    """A tree with a round crown."""
    pen.box(1, 0.44, 0.5, 0.56, 0.95)
    for _ in range(9):
        pen.oval(0, pen.any(0.3, 0.7), pen.any(0.22, 0.48), 0.17, 0.15)
    for _ in range(5):
        pen.oval(2, pen.any(0.25, 0.75), pen.any(0.2, 0.5), 0.03, 0.03)


def fish(pen: Pen) -> None:
    """A fish, looking left."""
    height = pen.any(0.16, 0.25)
    pen.shape(1, 0.66, 0.5, 0.95, 0.5 - height, 0.88, 0.5, 0.95, 0.5 + height)
    pen.shape(1, 0.35, 0.36, 0.5, 0.14, 0.6, 0.36)
    pen.oval(0, 0.42, 0.5, 0.32, height)
    for x in (0.42, 0.54):
        pen.arc(2, x - 0.05, 0.5, 0.14, -50, 50, 0.025)
    pen.oval(3, 0.22, 0.46, 0.04, 0.04)


def boat(pen: Pen) -> None:
    """A boat with one or two sails."""
    pen.shape(0, 0.08, 0.7, 0.92, 0.7, 0.76, 0.9, 0.22, 0.9)
    pen.line(2, 0.5, 0.08, 0.5, 0.7)
    pen.shape(1, 0.53, 0.1, 0.53, 0.64, pen.any(0.78, 0.9), 0.64)
    if pen.any(0, 1) < 0.6:
        pen.shape(3, 0.47, 0.2, 0.47, 0.64, pen.any(0.16, 0.26), 0.64)


def flower(pen: Pen) -> None:
    """A flower of five to nine petals."""
    pen.line(2, 0.5, 0.4, 0.5, 0.96, width=0.04)
    pen.oval(2, 0.62, 0.78, 0.12, 0.05)
    count = int(pen.rng.integers(5, 10))
    for i in range(count):
        turn = 2 * math.pi * i / count
        pen.oval(0, 0.5 + 0.2 * math.cos(turn), 0.34 + 0.2 * math.sin(turn), 0.11, 0.11)
    pen.oval(1, 0.5, 0.34, 0.12, 0.12)


def car(pen: Pen) -> None:
    """A car from the side."""
    roof = pen.any(0.26, 0.36)
    pen.shape(0, 0.24, 0.5, 0.34, roof, 0.66, roof, 0.8, 0.5)
    pen.box(0, 0.06, 0.5, 0.94, 0.72)
    pen.shape(3, 0.31, 0.5, 0.38, roof + 0.05, 0.49, roof + 0.05, 0.49, 0.5)
    pen.shape(3, 0.53, 0.5, 0.53, roof + 0.05, 0.63, roof + 0.05, 0.72, 0.5)
    for x in (0.26, 0.74):
        pen.oval(1, x, 0.72, 0.12, 0.12)
        pen.oval(2, x, 0.72, 0.05, 0.05)


def cup(pen: Pen) -> None:
    """A cup with a handle and steam."""
    top = pen.any(0.36, 0.44)
    pen.arc(0, 0.72, 0.62, 0.15, -100, 100, 0.05)
    pen.shape(0, 0.2, top, 0.74, top, 0.66, 0.9, 0.28, 0.9)
    pen.oval(1, 0.47, top, 0.27, 0.06)
    pen.box(2, 0.26, 0.58, 0.685, 0.68)
    for x in (0.38, 0.55):
        pen.line(3, x, 0.28, x + 0.04, 0.21, x - 0.02, 0.14, x + 0.03, 0.06, width=0.025)


def butterfly(pen: Pen) -> None:
    """A butterfly from above."""
    upper, lower = pen.any(0.17, 0.23), pen.any(0.12, 0.17)
    for side in (-1, 1):
        pen.oval(0, 0.5 + side * 0.24, 0.36, 0.22, upper)
        pen.oval(1, 0.5 + side * 0.19, 0.68, 0.16, lower)
        pen.oval(2, 0.5 + side * 0.26, 0.36, 0.08, 0.08)
        pen.line(3, 0.5, 0.25, 0.5 + side * 0.12, 0.08, width=0.02)
    pen.oval(3, 0.5, 0.52, 0.045, 0.3)


def mushroom(pen: Pen) -> None:
    """A mushroom with dots."""
    pen.shape(1, 0.4, 0.5, 0.6, 0.5, 0.66, 0.93, 0.34, 0.93)
    pen.oval(0, 0.5, 0.5, 0.4, pen.any(0.32, 0.4))
    pen.image.paste((0, 0, 0, 0), (0, round(pen.image.width * 0.54), *pen.image.size))
    pen.shape(1, 0.41, 0.53, 0.59, 0.53, 0.65, 0.93, 0.35, 0.93)
    for x, y in ((0.3, 0.4), (0.5, 0.25), (0.68, 0.42), (0.48, 0.45)):
        pen.oval(2, x + pen.any(-0.03, 0.03), y, 0.055, 0.045)


def umbrella(pen: Pen) -> None:
    """An open umbrella."""
    pen.line(2, 0.5, 0.12, 0.5, 0.82, width=0.035)
    pen.arc(2, 0.43, 0.82, 0.085, 0, 180, 0.035)
    half = round(pen.image.width * 0.5)
    pen.oval(0, 0.5, 0.5, 0.42, 0.36)
    pen.oval(1, 0.5, 0.5, 0.15, 0.36)
    pen.image.paste((0, 0, 0, 0), (0, half, *pen.image.size))
    for x in (0.22, 0.5, 0.78):
        pen.oval(0 if x != 0.5 else 1, x, 0.5, 0.14, 0.05)
    pen.line(2, 0.5, 0.5, 0.5, 0.82, width=0.035)
    pen.arc(2, 0.43, 0.82, 0.085, 0, 180, 0.035)


def key(pen: Pen) -> None:
    """A key with a ring and teeth."""
    for color, radius in ((0, 0.2), (4, 0.1)):
        pen.oval(color, 0.28, 0.5, radius, radius)
    pen.box(0, 0.45, 0.46, 0.92, 0.54)
    for x in (0.74, 0.83):
        pen.box(0, x, 0.54, x + 0.06, pen.any(0.62, 0.7))


def clock(pen: Pen) -> None:
    """A clock at a random hour."""
    for color, radius in ((0, 0.42), (1, 0.35)):
        pen.oval(color, 0.5, 0.5, radius, radius)
    for i in range(12):
        x, y = math.cos(math.pi * i / 6), math.sin(math.pi * i / 6)
        pen.line(2, 0.5 + 0.28 * x, 0.5 + 0.28 * y, 0.5 + 0.33 * x, 0.5 + 0.33 * y, width=0.025)
    for length, width in ((0.18, 0.045), (0.27, 0.03)):
        turn = pen.any(0, 2 * math.pi)
        end = 0.5 + length * math.cos(turn), 0.5 + length * math.sin(turn)
        pen.line(3, 0.5, 0.5, *end, width=width)


# Hue, strength and light of a colour, from the least to the most; hues beyond 1 start again.
COLORS = {
    "any": (0.0, 1.0, 0.5, 1.0, 0.3, 1.0),
    "dark": (0.0, 1.0, 0.0, 0.5, 0.05, 0.3),
    "gold": (0.1, 0.16, 0.5, 1.0, 0.6, 0.95),
    "leaf": (0.2, 0.42, 0.4, 1.0, 0.3, 0.8),
    "pale": (0.0, 1.0, 0.0, 0.3, 0.6, 1.0),
    "petal": (0.72, 1.15, 0.5, 1.0, 0.6, 1.0),
    "warm": (0.92, 1.1, 0.6, 1.0, 0.5, 1.0),
    "water": (0.48, 0.68, 0.4, 1.0, 0.4, 1.0),
    "white": (0.0, 1.0, 0.0, 0.12, 0.85, 1.0),
    "wood": (0.03, 0.1, 0.4, 0.8, 0.25, 0.6),
}
# How a kind is drawn, and the colours of its parts.
KINDS: dict[str, tuple[Callable[[Pen], None], str]] = {
    "boat": (boat, "wood white dark any"),
    "butterfly": (butterfly, "any any gold dark"),
    "car": (car, "any dark pale water"),
    "clock": (clock, "dark white dark dark"),
    "cup": (cup, "any wood any white"),
    "fish": (fish, "warm gold white dark"),
    "flower": (flower, "petal gold leaf"),
    "house": (house, "pale warm wood water"),
    "key": (key, "gold dark dark dark pale"),
    "mushroom": (mushroom, "warm pale white"),
    "tree": (tree, "leaf wood warm"),
    "umbrella": (umbrella, "any any dark"),
}


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """One drawing of this kind, ``[96, 96]`` RGB."""
    paint, colors = KINDS[kind]
    pen = Pen(SIDE * _SCALE, [_color(name, rng) for name in colors.split()], rng)
    paint(pen)
    thing = pen.image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    size = round(SIDE * rng.uniform(0.75, 1))
    thing = thing.resize((size, size), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ground = _ground(rng)
    left, top = (int(each) for each in rng.integers(0, SIDE - size + 1, 2))
    ground.paste(thing, (left, top), thing)
    return ground


def drawings(per_class: int = 60, seed: int = 0) -> tuple[list[Image.Image], list[str]]:
    """Images and the names of what is on them, `per_class` of each kind."""
    made = [
        (draw(kind, np.random.default_rng((seed, number, i))), kind)
        for number, kind in enumerate(KINDS)
        for i in range(per_class)
    ]
    return [image for image, _ in made], [kind for _, kind in made]


def save(folder: Path, per_class: int, seed: int = 0) -> None:
    """Write the drawings as PNG files, a folder for each kind."""
    for number, (image, kind) in enumerate(zip(*drawings(per_class, seed), strict=True)):
        path = folder / kind / f"{number % per_class:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def _color(name: str, rng: np.random.Generator) -> Color:
    low, high = np.array(COLORS[name]).reshape(3, 2).T
    hue, strength, light = rng.uniform(low, high)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, strength, light)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ground(rng: np.random.Generator) -> Image.Image:
    """A gradient, with blurred spots and stripes on some."""
    ends = np.array([_color("pale", rng), _color("pale", rng)])
    along = np.linspace(0, 1, SIDE)[:, None, None]
    pixels = np.broadcast_to(ends[0] * (1 - along) + ends[1] * along, (SIDE, SIDE, 3))
    image = Image.fromarray(pixels.astype(np.uint8)).rotate(90 * int(rng.integers(4)))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 9))):
        x, y, radius = (int(each) for each in rng.integers((0, 0, 3), (SIDE, SIDE, SIDE // 4)))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), _color("pale", rng))
    if rng.random() < 0.3:
        color, gap = _color("pale", rng), int(rng.integers(7, 20))
        for x in range(-SIDE, SIDE, gap):
            pen.line((x, 0, x + SIDE, SIDE), color, gap // 4)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.5))))
    noise = rng.normal(0, 8, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def main() -> None:
    """Write the drawings as files, a folder for each kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where they go")
    parser.add_argument("--per-class", type=int, default=60, help="of each kind (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="decides everything (default: 0)")
    args = parser.parse_args()
    save(args.folder, args.per_class, args.seed)


if __name__ == "__main__":
    main()
