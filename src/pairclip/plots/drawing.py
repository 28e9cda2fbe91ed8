"""What all pictures share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart.
SAME_COLOR = "#0072b2"
DIFFERENT_COLOR = "#d55e00"


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] | None = None
) -> Figure:
    """An empty figure of this size in inches, outside pyplot, which would keep it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed: pip install pairclip[plot]"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout=layout)


def shortened(name: str, length: int) -> str:
    """A name on one line, cut to a length."""
    name = " ".join(str(name).split())
    return name if len(name) <= length else name[: length - 1] + "…"


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, saved where there is a path."""
    if path is not None:
        figure.savefig(path)
    return figure
