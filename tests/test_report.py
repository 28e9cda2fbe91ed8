"""Pages: well formed, self-contained, and deaf to hostile names."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from pairclip import (
    Evaluation,
    History,
    VisionTower,
    cache_features,
    evaluate,
    evaluate_embeddings,
)
from pairclip.report import write_report, write_search_report
from pairclip.report.alike import highlighted
from pairclip.report.charts import _axes, _Frame
from pairclip.report.colors import heat_styles
from pairclip.report.gallery import _shared_out
from pairclip.report.html import Html, element

HOSTILE = "</script><script>alert(1)</script><b title='\"'>&amp;"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements of a page with their attributes; fails where tags don't match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in {"style", "script"})


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 20, 30, 3), dtype=np.uint8)


def evaluation(seed: int, spread: float, classes: int = 4, count: int = 80) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    rows = torch.eye(classes)[labels] + spread * torch.randn(count, classes, generator=generator)
    names = [HOSTILE, *(f"class {i}" for i in range(1, classes))]
    return evaluate_embeddings(rows, labels, class_names=names)


@pytest.fixture(scope="module")
def evaluations() -> tuple[Evaluation, Evaluation]:
    return evaluation(0, 1.0), evaluation(1, 0.5)


@pytest.fixture(scope="module")
def written(
    evaluations: tuple[Evaluation, Evaluation], tmp_path_factory: pytest.TempPathFactory
) -> Page:
    before, after = evaluations
    folder = tmp_path_factory.mktemp("report") / "new"
    steps = [{"step": i + 1, "loss": 1 / (i + 1)} for i in range(900)]
    figures = {"recall_at_1": 0.5, "mean_average_precision": 0.25, "gap": None}
    path = write_report(
        folder,
        before,
        after,
        dataset=(pictures(80), after.labels),
        history=History(steps=steps, evaluations=[{"step": 450, **figures}]),
        title=f"Title {HOSTILE}",
        note=f"Note {HOSTILE}",
    )
    assert path == folder / "report.html"
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return Page(path)


def test_the_page_loads_nothing(written: Page) -> None:
    for tag, attributes in written.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/", "#")), (tag, target)
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    assert "http" not in written.source.replace("http-equiv", "")
    assert "@import" not in written.source
    assert "url(" not in written.source
    (policy,) = [
        attributes["content"]
        for attributes in written.all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_names_are_only_text(written: Page) -> None:
    assert len(written.all("script")) == 1
    assert not written.all("b")
    assert written.source.count("alert(1)") == written.source.count(
        "&lt;/script&gt;&lt;script&gt;alert(1)"
    )
    assert ("h1", f"Title {HOSTILE}") in written.texts
    assert f"Note {HOSTILE}" in written.text()


def test_the_page_is_fit_for_readers_of_all_kinds(written: Page) -> None:
    assert written.all("html") == [{"lang": "en"}]
    assert any(each.get("name") == "viewport" for each in written.all("meta"))
    levels = [int(tag[1]) for tag, _ in written.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    for tag, attributes in written.elements:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


def test_each_image_is_stored_once(written: Page) -> None:
    stored = [each["href"] for each in written.all("image")]
    names = [each["id"] for each in written.all("symbol")]
    used = [each["href"].removeprefix("#") for each in written.all("use")]
    assert len(set(names)) == len(names) == len(stored) <= 80
    assert set(used) == set(names)
    assert len(used) > len(names)
    for uri in stored:
        data = base64.b64decode(uri.partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (30, 20)


def test_the_gallery_tells_what_became_of_the_queries(
    written: Page, evaluations: tuple[Evaluation, Evaluation]
) -> None:
    was, now = (
        each.labels[each.neighbors[:, 0]] == each.labels[each.queries] for each in evaluations
    )
    cases = [each for each in written.all("li") if "data-kind" in each]
    found = {"fixed": ~was & now, "new": was & ~now, "still": ~was & ~now}
    numbers = _shared_out([each.sum() for each in found.values()], 60)
    for (kind, expected), number in zip(found.items(), numbers, strict=True):
        assert sum(each["data-kind"] == kind for each in cases) == number
        of_all = f" of {expected.sum()}" if number < expected.sum() else ""
        assert f"{number}{of_all} queries" in written.text()
    frames = [each["class"] for each in written.all("figure") if "hit" in each.get("class", "")]
    assert len(frames) == 10 * len(cases)
    assert set(frames) == {"hit right", "hit wrong"}


def test_figures_and_their_intervals_are_on_the_page(
    written: Page, evaluations: tuple[Evaluation, Evaluation]
) -> None:
    before, after = evaluations
    text = written.text()
    change = after.changes(before)["mean_average_precision"]
    low, high = change.interval or (0, 0)
    assert f"{low:+.3f} to {high:+.3f}: a clear gain" in text
    assert ("td", f" {change.difference:+.3f}") in [
        (tag, text) for tag, text in written.texts if tag == "td"
    ]
    heat = [each for each in written.all("table") if each.get("class") == "heat"]
    assert [each["data-when"] for each in heat] == ["before", "after"]
    cells = [each for each in written.all("td") if each.get("title", "").endswith(": 1.00")]
    assert all(each["class"] == "h100" for each in cells)


def test_each_bin_of_a_histogram_has_its_width_and_height(tmp_path: Path) -> None:
    collapsed = evaluate_embeddings(torch.ones(8, 3), torch.arange(8) % 2)
    page = Page(write_report(tmp_path, None, collapsed))
    (path,) = [each["d"] for each in page.all("path") if each["class"] == "area same"]
    points = np.array([point.split() for point in path[1:].split("L")], dtype=float)
    across, down = points.T
    floor = down[0]
    assert down[-1] == floor
    top = across[down == down.min()]
    assert down.min() < floor - 100
    assert np.ptp(top) > 0.9 * np.ptp(across)


def test_many_queries_are_shared_out_among_the_kinds() -> None:
    assert _shared_out([100, 5, 100], 60) == [27, 5, 28]
    assert _shared_out([1, 2, 3], 60) == [1, 2, 3]
    assert sum(_shared_out([1000, 1000, 1000], 60)) == 60


def test_one_evaluation_is_a_page_too(evaluations: tuple[Evaluation, ...], tmp_path: Path) -> None:
    _, after = evaluations
    page = Page(write_report(tmp_path, None, after, dataset=(pictures(80), after.labels)))
    assert ("h1", "Evaluation") in page.texts
    assert {each["data-kind"] for each in page.all("li")} == {"right", "wrong"}
    assert len([each for each in page.all("table") if each.get("class") == "heat"]) == 1


@pytest.mark.parametrize("classes", [1, 2, 130])
def test_any_number_of_classes_makes_a_page(classes: int, tmp_path: Path) -> None:
    found = evaluation(0, 0.3, classes, count=2 * max(classes, 3))
    page = Page(write_report(tmp_path, found, found))
    assert len(page.source) < 2_000_000
    if classes == 130:
        assert "40 of 130 classes" in page.text()
        assert len([each for each in page.all("td") if each.get("title")]) == 2 * 40 * 40


def test_a_page_of_many_photographs_is_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 50, 50, 3), dtype=np.uint8)
    photographs = noise.repeat(2, axis=1).repeat(2, axis=2)
    before, after = evaluation(0, 2.0, count=400), evaluation(1, 1.0, count=400)
    path = write_report(tmp_path, before, after, dataset=(photographs, after.labels))
    assert path.stat().st_size < 5_000_000
    page = Page(path)
    assert len([each for each in page.all("li") if "data-kind" in each]) == 60
    assert {each["width"] for each in page.all("image")} == {"96"}


def test_further_evaluations_have_their_table(tmp_path: Path) -> None:
    before, after = (
        replace(evaluation(seed, 1.0), also={HOSTILE: evaluation(seed, 0.5)}) for seed in (0, 1)
    )
    page = Page(write_report(tmp_path, before, after))
    assert f"Metrics of “{HOSTILE}”" in page.text()
    assert len([each for each in page.all("table") if each.get("class") == "metrics"]) == 2


def test_images_of_files_are_called_so(tower: VisionTower, tmp_path: Path) -> None:
    names = [HOSTILE.replace("/", "_"), "a cat"]
    for number, picture in enumerate(pictures(6)):
        folder = tmp_path / "all" / names[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"<i>{number}.png")
    part = Subset(ImageFolder(str(tmp_path / "all")), [5, 1, 4, 0])
    evaluation = evaluate(tower, part)
    page = Page(write_report(tmp_path, None, evaluation, dataset=part, tower=tower))
    assert not page.all("i")
    titles = [attributes.get("title") for _, attributes in page.elements]
    labels = [each.get("aria-label") for each in page.all("svg")]
    for number in (5, 2, 3, 0):
        path = str(tmp_path / "all" / names[number % 2] / f"<i>{number}.png")
        assert ("small", f"<i>{number}.png") in page.texts
        assert path in titles
        assert f"{names[number % 2]}, {path}" in titles
        assert f"query: {names[number % 2]}, {path}" in labels
    assert not re.search(r"image \d", page.text())


def test_a_kind_without_queries_has_none(tmp_path: Path) -> None:
    flat, apart = (evaluation(0, spread) for spread in (1.0, 0.01))
    page = Page(write_report(tmp_path, flat, apart, dataset=(pictures(80), flat.labels)))
    titles = [text for tag, text in page.texts if tag in ("h3", "p")]
    for title in ("Right before, wrong after", "Wrong before and after"):
        assert titles[titles.index(title) + 1] == "None."
    assert [text for tag, text in page.texts if tag == "option"][:2] == [
        "all",
        "Wrong before, right after",
    ]


def test_other_images_are_refused(evaluations: tuple[Evaluation, ...], tmp_path: Path) -> None:
    before, after = evaluations
    with pytest.raises(ValueError, match="`baseline` must be of the same images"):
        write_report(tmp_path, evaluation(0, 1.0, count=76), after)
    with pytest.raises(ValueError, match="`dataset` must be the evaluated one, got 79 images"):
        write_report(tmp_path, before, after, dataset=(pictures(79), after.labels[:79]))
    assert not list(tmp_path.iterdir())


def test_queries_find_images_of_a_gallery(tower: VisionTower, tmp_path: Path) -> None:
    images, names = pictures(12), [f"class {i}" for i in [2, 0, 1] * 4]
    queries, gallery = (images[:4], names[:4]), (images[4:], [*names[4:11], "none of these"])
    evaluation = evaluate(tower, queries, gallery)
    path = write_report(tmp_path, None, evaluation, dataset=queries, gallery=gallery, tower=tower)
    page = Page(path)
    assert "On 4 images, searched for among 8 of a gallery, together of 4 classes" in page.text()
    assert "Search: each image in the gallery" in page.text()
    captions = [each["aria-label"] for each in page.all("svg") if each.get("class") == "thumb"]
    shown = [each for each in captions if not each.startswith("query: ")]
    assert len(shown) == 4 * 5
    for caption in shown:
        name, number = re.fullmatch("(?:right|wrong): (.*), image (.*)", caption).groups()
        assert name == gallery[1][int(number)]
    assert "none of these" in page.text()
    # The picture of image 0 of the gallery is not that of query 0.
    stored = [each["href"] for each in page.all("image")]
    assert len(set(stored)) == len(stored) == len({each["id"] for each in page.all("symbol")})
    with pytest.raises(ValueError, match="`gallery` must be there if the evaluation has one"):
        write_report(tmp_path, None, evaluation, dataset=queries)
    with pytest.raises(ValueError, match="`gallery` must be the evaluated one, got 4 images"):
        write_report(tmp_path, None, evaluation, dataset=queries, gallery=queries)


def test_the_parts_that_make_classes_alike_are_shown(tower: VisionTower, tmp_path: Path) -> None:
    data = (pictures(8), [0, 1] * 4)
    evaluation = evaluate(tower, data)
    page = Page(write_report(tmp_path, None, evaluation, dataset=data, tower=tower))
    assert "0 and 1: similarity " in page.text() or "1 and 0: similarity " in page.text()
    shown = [each["alt"] for each in page.all("img")]
    assert len(shown) == 4
    assert shown[1] == f"{shown[0]}: the parts that count"
    falls = np.zeros((2, 3))
    falls[0, 2] = 0.5
    image = Image.new("RGB", (300, 200), (200, 100, 50))
    bright = np.asarray(highlighted(image, falls))
    assert bright[20, 280].tolist() == [200, 100, 50]
    assert bright[180, 20].max() <= 40
    with pytest.raises(ValueError, match="`tower` would be ignored: give the `dataset`"):
        write_report(tmp_path, None, evaluation, tower=tower)


def test_features_are_not_shown_as_images(tower: VisionTower, tmp_path: Path) -> None:
    trunk, head = tower.split(1)
    features = cache_features(trunk, (pictures(8), [0, 1] * 4), tmp_path / "features")
    with pytest.raises(ValueError, match="`dataset` must have images to show, got CachedFeatures"):
        write_report(tmp_path / "out", None, evaluate(head, features), dataset=features)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.66, 0.97, "0.70 0.75 0.80 0.85 0.90 0.95"),
        (0.98, 1.0004, "0.980 0.985 0.990 0.995 1.000"),
        (0.99, 1.0, "0.990 0.992 0.994 0.996 0.998 1.000"),
        (-1, 1, "-1.0 -0.5 0.0 0.5 1.0"),
        (1, 4000, "1000 2000 3000 4000"),
    ],
)
def test_axes_have_round_values_told_apart(low: float, high: float, expected: str) -> None:
    axes = "".join(map(str, _axes(_Frame((low, high), (0, 1)), "x")))
    assert " ".join(re.findall(r'class="tick">([^<]*)<', axes)) == f"{expected} x"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1, 2, "1 2"), (1, 4, "1 2 3 4"), (1, 9, "1 2 3 4 5 6 7 8 9"), (1, 24, "5 10 15 20")],
)
def test_steps_are_whole(low: float, high: float, expected: str) -> None:
    axes = "".join(map(str, _axes(_Frame((low, high), (0, 1)), "step", whole=True)))
    assert " ".join(re.findall(r'class="tick">([^<]*)<', axes)) == f"{expected} step"


def test_every_colour_can_be_read_on() -> None:
    rules = re.findall(r"background:#(\w{6});color:#(\w)", heat_styles())
    assert len(rules) == 2 * 101
    for ground, ink in rules:
        channels = np.array([int(ground[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        luminance = float(linear @ (0.2126, 0.7152, 0.0722))
        other = 1.0 if ink == "f" else 0.0
        assert (max(luminance, other) + 0.05) / (min(luminance, other) + 0.05) >= 4.5


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", "<b>", element("i", '"'), data_x="<'\">", hidden=None) == (
        '<p data-x="&lt;&#x27;&quot;&gt;">&lt;b&gt;<i>&quot;</i></p>'
    )
    assert element("p", Html("<b>")) == "<p><b></p>"
    assert element("p", "\udc80") == "<p>?</p>"


def test_a_search_is_a_page(tmp_path: Path) -> None:
    image = Image.fromarray(pictures(1)[0]).resize((400, 200))
    path = write_search_report(
        tmp_path / "found", image, [(image, HOSTILE, 0.875), (image, "b.png", 0.5)], note=HOSTILE
    )
    page = Page(path)
    assert path == tmp_path / "found" / "search.html"
    assert [each["alt"] for each in page.all("img")] == ["the query image", HOSTILE, "b.png"]
    assert {(each["width"], each["height"]) for each in page.all("img")} == {("192", "96")}
    assert "0.875" in page.text()
    assert len(page.all("script")) == 1


def test_a_picture_is_what_a_person_sees(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    turned = Image.open(tmp_path / "turned.jpg")
    page = Page(write_search_report(tmp_path, clear, [(turned, "turned", 0.5)]))
    white, upright = (
        Image.open(io.BytesIO(base64.b64decode(each["src"].partition(",")[2])))
        for each in page.all("img")
    )
    assert white.getextrema() == ((255, 255),) * 3
    assert upright.size == (4, 8)
