"""What makes images of the most confused classes alike, as pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import Alike, EvaluationImages, alike, file_name
from pairclip.report.html import Html, element, section
from pairclip.report.thumbnails import picture
from pairclip.saliency import PairSaliency, occlusion_saliency
from pairclip.towers import VisionTower

_PAIRS = 4
_SIDE = 160
# Falls below this are noise, and are not stretched over the whole range.
_FAINT = 0.02
_WORDS = (
    "Of each of the most confused classes the two images that the tower finds most alike. Below "
    "each is what counts for that: a window of its mean colour covers one part after the other, "
    "and the image is bright where their similarity falls the most, dark where covering changes "
    "nothing or makes them more alike. Bright ground or borders, rather than the thing itself, say "
    "that the tower looks at the wrong part."
)


def alike_images(
    evaluation: Evaluation, images: EvaluationImages, tower: VisionTower
) -> Html | None:
    """A section with the most confusing images and the parts that confuse."""
    pairs = alike(evaluation, _PAIRS)
    if not pairs:
        return None
    items = [_pair(pair, images, tower) for pair in pairs]
    return section("What makes classes alike", element("ul", *items, class_="alike"), intro=_WORDS)


def _pair(pair: Alike, images: EvaluationImages, tower: VisionTower) -> Html:
    query, neighbor = images.queries[pair.query][0], images.gallery[pair.neighbor][0]
    of_query = occlusion_saliency(tower, query, neighbor)
    of_neighbor = occlusion_saliency(tower, neighbor, query)
    one, other = pair.classes
    return element(
        "li",
        element("p", f"{one} and {other}: similarity {of_query.similarity:.2f}", class_="when"),
        _image(query, one, file_name(images.queries, pair.query), of_query),
        _image(neighbor, other, file_name(images.gallery, pair.neighbor), of_neighbor),
    )


def _image(
    image: Image.Image, class_name: str, name: tuple[str, str | None], saliency: PairSaliency
) -> Html:
    file, path = name
    caption, whole = f"{class_name}, {file}", f"{class_name}, {path or file}"
    fall = float(saliency.falls.max())
    return element(
        "figure",
        picture(_enlarged(image), _SIDE, whole),
        picture(
            highlighted(image, saliency.falls.numpy()), _SIDE, f"{whole}: the parts that count"
        ),
        element(
            "figcaption",
            element("span", caption, class_="name", title=whole),
            element("small", f"falls by up to {max(fall, 0):.2f}"),
        ),
    )


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, -(-_SIDE // max(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def highlighted(image: Image.Image, falls: np.ndarray) -> Image.Image:
    """The image, bright where the similarity falls and dark elsewhere."""
    weights = falls.clip(0) / max(float(falls.max()), _FAINT)
    bright = _enlarged(image)
    mask = Image.fromarray((255 * weights).round().astype(np.uint8)).resize(
        bright.size, Image.Resampling.BICUBIC
    )
    dark = bright.convert("L").point(lambda value: value // 4).convert("RGB")
    return Image.composite(bright, dark, mask)
