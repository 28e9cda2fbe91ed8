"""Colours of similarities, for light and dark pages, as style rules."""

from __future__ import annotations

import math

# Steps from -1 to 1 that have a colour of their own: classes h0 to h100.
_LEVELS = 100
Color = tuple[float, float, float]
# Opposite, unrelated, alike.
_LIGHT: tuple[Color, Color, Color] = ((33, 102, 172), (247, 247, 247), (178, 24, 43))
_DARK: tuple[Color, Color, Color] = ((120, 180, 245), (34, 37, 43), (255, 132, 110))


def heat_class(similarity: float) -> str:
    """Name of the style of a similarity."""
    if math.isnan(similarity):
        return "undefined"
    return f"h{round((min(max(similarity, -1.0), 1.0) + 1) / 2 * _LEVELS)}"


def heat_styles() -> str:
    """Rules of all similarities, each with the ink, black or white, that reads best on it."""
    return f"{_rules(_LIGHT)}@media (prefers-color-scheme: dark) {{\n{_rules(_DARK)}}}\n"


def _rules(poles: tuple[Color, Color, Color]) -> str:
    return "".join(f".h{level}{{{_rule(poles, level)}}}\n" for level in range(_LEVELS + 1))


def _rule(poles: tuple[Color, Color, Color], level: int) -> str:
    position = 2 * level / _LEVELS - 1
    pole = poles[2] if position > 0 else poles[0]
    red, green, blue = (
        round(end * abs(position) + middle * (1 - abs(position)))
        for middle, end in zip(poles[1], pole, strict=True)
    )
    # Black and white contrast equally with a ground of this luminance.
    ink = "#000" if _luminance((red, green, blue)) > 0.179 else "#fff"
    return f"background:#{red:02x}{green:02x}{blue:02x};color:{ink}"


def _luminance(color: Color) -> float:
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in color)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
