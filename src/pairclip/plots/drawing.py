"""What all pictures share."""

from __future__ import annotations

import os
import textwrap
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pairclip._files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart.
SAME_COLOR = "#0072b2"
DIFFERENT_COLOR = "#d55e00"
TITLE_SIZE = 11
_LETTER = 0.088  # inches of a letter of that size
_EAST_ASIAN = {
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAexGothic"),
    *("Hiragino Sans", "PingFang SC", "Heiti TC", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Yu Gothic", "Microsoft YaHei", "SimHei", "Malgun Gothic"),
}


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
    """A name on one line, cut to a length; letters of East Asia are two wide."""
    # Lone surrogates, which undecodable folder names have, can't be drawn.
    name = " ".join(str(name).encode("utf-8", "replace").decode("utf-8").split())
    ends = np.cumsum([1 + (unicodedata.east_asian_width(letter) in "WF") for letter in name])
    if not len(name) or ends[-1] <= length:
        return name
    return name[: int((ends < length).sum())] + "…"


def wrapped(title: str | None, width: float) -> str:
    """A title in lines that fit a figure of this width in inches."""
    most = max(20, int(width / _LETTER))
    return "\n".join(textwrap.fill(line, most) for line in (title or "").splitlines())


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, saved where there is a path; with a font for scripts of East Asia."""
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    fonts = east_asian_fonts()
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *fonts])
    with warnings.catch_warnings():
        if not fonts and any(char >= "\u2e80" for text in texts for char in text.get_text()):
            warnings.warn(
                "Some names are in a script for which this machine has no font, and are drawn as "
                "boxes: install one, such as Noto Sans CJK.",
                stacklevel=3,
            )
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # once is enough
        if path is not None:
            kind = Path(path).suffix[1:] or figure.canvas.get_default_filetype()
            with whole_file(Path(path).with_suffix(f".{kind}")) as file:
                figure.savefig(file, format=kind)
    return figure


def east_asian_fonts() -> list[str]:
    """Which fonts with Chinese, Japanese or Korean characters the machine has."""
    from matplotlib.font_manager import fontManager

    return sorted({font.name for font in fontManager.ttflist} & _EAST_ASIAN)
