"""Pictures of an example that pyplot does not know, as pairclip's functions return them."""

from typing import Any
from weakref import WeakSet

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

_SEEN: WeakSet[Figure] = WeakSet()


def scraper(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save what is called `figure` after a block, once, as sphinx-gallery asks of a scraper."""
    figure = block_vars["example_globals"].get("figure")
    if not isinstance(figure, Figure) or figure in _SEEN:
        return ""
    _SEEN.add(figure)
    if figure.canvas.manager:  # one of pyplot's, which has a scraper of its own
        return ""
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, bbox_inches="tight")
    return figure_rst([path], gallery_conf["src_dir"])
