"""Sphinx configuration."""

import html
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.ext import intersphinx

import pairclip

HERE = Path(__file__).parent
# The tower of the gallery and the tutorial is so small that more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The gallery's drawings, and what saves its pictures.
sys.path[:0] = [str(HERE.parent / "examples" / "offline"), str(HERE)]

project = "pairclip"
author = "The pairclip authors"
copyright = "2026, The pairclip authors"
version = release = pairclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "figures/*.py", "gallery", "examples/*.ipynb", "examples/*.py"]
html_theme = "furo"
html_title = "pairclip"
html_static_path = ["static"]
html_css_files = ["pairclip.css"]
# Every reference must resolve, those to other projects too.
nitpicky = True
# Types that annotations name and nobody imports: the text beside them says what they are.
nitpick_ignore = {
    ("py:class", name)
    for name in (
        "Body",
        "Negatives",
        "OptimizerFactory",
        "Precision",
        "Reduction",
        "Schedule",
        "pairclip.datasets.stream_items.StreamPlace",
        "pairclip.finetuner.batches.BatchSampler",
        "pairclip.index.faiss.Searchable",
        "pairclip.recipes.imprinting._Loss",
        "pairclip.similarity.ClassTotals",
    )
}
# Formulas are MathML, made here: a script from elsewhere would show none where there is no network.
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"
# `load_tower` in a docstring becomes a link where it names something.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3


def elsewhere(url: str, name: str) -> tuple[str, tuple[str | None, ...]]:
    """Another project: its own inventory, or ours where there is no network."""
    return url, (None, str(HERE / "inventories" / f"{name}.txt"))


intersphinx_timeout = 5
intersphinx_mapping = {
    "python": elsewhere("https://docs.python.org/3/", "python"),
    "numpy": elsewhere("https://numpy.org/doc/stable/", "numpy"),
    "torch": elsewhere("https://docs.pytorch.org/docs/stable/", "torch"),
    "torchvision": elsewhere("https://docs.pytorch.org/vision/stable/", "torchvision"),
    "matplotlib": elsewhere("https://matplotlib.org/stable/", "matplotlib"),
    "pillow": elsewhere("https://pillow.readthedocs.io/en/stable/", "pillow"),
    # Hugging Face has no inventory to download.
    "huggingface": (
        "https://huggingface.co/docs/",
        str(HERE / "inventories" / "huggingface.txt"),
    ),
}

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "examples",
    "filename_pattern": "/plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("pictures.scraper", "matplotlib"),
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,  # a page that loads scripts from elsewhere
    "remove_config_comments": True,
    "plot_gallery": "True",  # in the HTML alone: see only_in_html
}
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_output_stderr = "remove"
nb_execution_raise_on_error = True

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

doctest_global_setup = """
import torch
torch.manual_seed(0)
"""


# What annotations and docstrings call a thing -> what its documentation calls it.
ALIASES = {
    "Accelerator": "accelerate.Accelerator",
    "accelerate.accelerator.Accelerator": "accelerate.Accelerator",
    "AutoModel": "transformers.AutoModel",
    "CLIPVisionModelWithProjection": "transformers.CLIPVisionModelWithProjection",
    "ConcatDataset": "torch.utils.data.ConcatDataset",
    "DataLoader": "torch.utils.data.DataLoader",
    "Figure": "matplotlib.figure.Figure",
    "GeneralTracker": "accelerate.tracking.GeneralTracker",
    "ImageFolder": "torchvision.datasets.ImageFolder",
    "ModelCard": "huggingface_hub.ModelCard",
    "Subset": "torch.utils.data.Subset",
    "Tensor": "torch.Tensor",
    "nn.Module": "torch.nn.Module",
    "npt.NDArray": "numpy.typing.NDArray",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.utils.data.dataloader.DataLoader": "torch.utils.data.DataLoader",
}


def parameters() -> Iterator[str]:
    """Names of the parameters of all that is public: in a docstring they are no links."""
    for room in ("", *(f".{room}" for room in pairclip._EXPORTS)):
        face = importlib.import_module(f"pairclip{room}")
        for thing in (getattr(face, name) for name in getattr(face, "__all__", ())):
            for each in (thing, *(vars(thing).values() if inspect.isclass(thing) else ())):
                if callable(each):
                    yield from inspect.signature(each).parameters


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Element | None:
    """Find a public name as users import it, wherever it is defined, and names from elsewhere."""
    if node.get("refdomain") != "py":
        return None
    python = env.domains["py"]
    target = ALIASES.get(node["reftarget"], node["reftarget"])
    parts = target.removeprefix("pairclip.").split(".")
    names = [f"pairclip.{'.'.join(parts[i:])}" for i in range(len(parts))]
    # pairclip.towers.vision_tower.VisionTower.freeze is documented as pairclip.VisionTower.freeze;
    # `suspect_labels`, which is not at the top, as pairclip.evaluation.suspect_labels.
    if not target.startswith("pairclip."):
        rooms = sorted({name.split(".")[1] for name in python.objects if name.count(".") == 2})
        names = [names[0], *(f"pairclip.{room}.{target}" for room in rooms)]
    for name in names:
        if name in python.objects:
            return python.resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, contnode
            )
    node["reftarget"], node["reftype"] = target, "obj"
    there = intersphinx.missing_reference(app, env, node, contnode)
    if there is None and target in app.config.pairclip_parameters:
        return contnode
    return there


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> Any:
    """Leave out the fields of a named tuple: its docstring has them already."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def only_in_html(app: Sphinx) -> None:
    """Other builders, as the doctests, have no use for pictures that take a minute to make."""
    if app.builder.name != "html":
        app.config.plot_gallery = False
        app.config.nb_execution_mode = "off"


def without_heading(titles: Mapping[str, str], folder: Path) -> list[str]:
    """Pages that don't show their own heading: Sphinx writes search.html, among others, itself."""
    lost = []
    for name, title in titles.items():
        page = (folder / f"{name}.html").read_text("utf-8")
        headings = [html.unescape(re.sub("<.*?>", "", each)) for each in re.findall("<h1.*", page)]
        if not any(heading.startswith(title) for heading in headings):
            lost.append(name)
    return lost


def check_pages(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.name != "html":
        return
    titles = {name: title.astext() for name, title in app.env.titles.items()}
    if lost := without_heading(titles, Path(app.outdir)):
        raise ExtensionError(f"Something else was written over {lost}: rename these pages.")
    if broken := broken_links(Path(app.outdir)):
        raise ExtensionError(f"Links that lead nowhere: {broken}")


def broken_links(folder: Path) -> list[str]:
    """Links to pages that are not there, or to places that are not in a page."""
    pages = {page: page.read_text("utf-8") for page in sorted(folder.rglob("*.html"))}
    places = {page.resolve(): set(re.findall(r' id="([^"]+)"', t)) for page, t in pages.items()}
    broken = set()
    for page, text in pages.items():
        if "_modules" in page.parts:
            continue
        for link in re.findall(r'<a [^>]*href="([^"]+)"', text):
            if re.match(r"\w+:", link):
                continue
            path, _, place = html.unescape(link).partition("#")
            target = (page.parent / path).resolve() if path else page.resolve()
            if not target.exists() or (place and place not in places.get(target, {place})):
                broken.add(f"{page.relative_to(folder).as_posix()}: {link}")
    return sorted(broken)


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    formula = latex2mathml.converter.convert(node.astext(), display="block")
    self.body.append(f'<div class="math" style="overflow-x: auto">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_config_value("pairclip_parameters", frozenset(parameters()), "env")
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("builder-inited", only_in_html, priority=1)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", resolve)
    app.connect("build-finished", check_pages)
