"""Sphinx configuration."""

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
]
exclude_patterns = ["_build", "figures/*.py"]
html_theme = "furo"
html_title = "pairclip"
nitpicky = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
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
