"""Sphinx configuration."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

import pairclip

project = "pairclip"
author = "The pairclip authors"
copyright = "2026, The pairclip authors"
version = release = pairclip.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "figures/*.py"]
html_theme = "furo"
html_title = "pairclip"
nitpicky = False
# Formulas are MathML, made here: a script from elsewhere would show none where there is no network.
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"
# `load_tower` in a docstring becomes a link where it names something, and code elsewhere.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

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


def resolve_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Element | None:
    """Link a public name, as users import it, to where its module's page documents it."""
    name, _, attribute = node.get("reftarget", "").removeprefix("pairclip.").partition(".")
    if node.get("refdomain") != "py" or name not in pairclip._MODULE_OF:
        return None
    target = f"pairclip.{pairclip._MODULE_OF[name]}.{name}" + (attribute and f".{attribute}")
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", target, node, contnode
    )


def without_heading(titles: Mapping[str, str], folder: Path) -> list[str]:
    """Pages that don't show their own heading: Sphinx writes search.html, among others, itself."""
    lost = []
    for name, title in titles.items():
        page = (folder / f"{name}.html").read_text("utf-8")
        headings = [html.unescape(re.sub("<.*?>", "", each)) for each in re.findall("<h1.*", page)]
        if not any(heading.startswith(title) for heading in headings):
            lost.append(name)
    return lost


def check_headings(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.name != "html":
        return
    titles = {name: title.astext() for name, title in app.env.titles.items()}
    if lost := without_heading(titles, Path(app.outdir)):
        raise ExtensionError(f"Something else was written over {lost}: rename these pages.")


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    formula = latex2mathml.converter.convert(node.astext(), display="block")
    self.body.append(f'<div class="math" style="overflow-x: auto">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("missing-reference", resolve_public_name)
    app.connect("build-finished", check_headings)
