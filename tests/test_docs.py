"""What the documentation says, and what its build checks by itself."""

import importlib.util
import json
import re
import warnings
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

import pairclip
from pairclip.evaluation.wording import meanings

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_that_lost_its_heading_is_noticed(conf: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "loss.html").write_text('<h1>The <code class="x">a &lt; b</code> loss<a>#</a></h1>')
    (tmp_path / "search.html").write_text("<h1>Search</h1>\n<p>Search your images</p>")
    titles = {"loss": "The a < b loss", "search": "Search your images"}
    assert conf.without_heading(titles, tmp_path) == ["search"]


def test_links_that_lead_nowhere_are_noticed(conf: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "loss.html").write_text(
        '<a href="https://elsewhere.org/x">x</a> <a href="#form">y</a> <h2 id="form">Form</h2>'
        '<a href="api/index.html#pairclip.tune">z</a> <a href="api/">folder</a>'
        '<a href="gone.html">gone</a> <a href="#nowhere">nowhere</a>'
    )
    (tmp_path / "api" / "index.html").write_text('<a href="../loss.html#shape">x</a>')
    assert conf.broken_links(tmp_path) == [
        "api/index.html: ../loss.html#shape",
        "loss.html: #nowhere",
        "loss.html: api/index.html#pairclip.tune",
        "loss.html: gone.html",
    ]


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = set(pairclip.__all__) - {"__version__"}
    assert set(re.findall(r"^\.\. auto\w+:: pairclip\.(\w+)$", pages, re.M)) == names
    overview = (DOCS / "api" / "index.md").read_text()
    assert set(re.findall(r"\{py:obj\}`(\w+)`", overview)) == names


def test_every_metric_is_explained() -> None:
    page = (DOCS / "metrics.md").read_text()
    for titles, meaning in meanings().items():
        assert f"| {titles} | {meaning} |" in page


def test_every_benchmark_is_listed_with_its_command() -> None:
    page = (DOCS / "benchmarks.md").read_text()
    listed = set(re.findall(r"`python tests/benchmarks/(\w+)\.py\b", page))
    scripts = (DOCS.parent / "tests" / "benchmarks").glob("[a-z]*.py")
    assert listed == {path.stem for path in scripts}


def test_the_tutorial_runs_and_ends_in_a_search_that_is_served() -> None:
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they are made anew
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Jupyter are not ours
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(DOCS)}}).execute()
    *_, served = (cell for cell in notebook.cells if cell.cell_type == "code")
    (answer,) = (each["data"]["text/plain"] for each in served.outputs if "data" in each)
    matches = json.loads(answer.replace("'", '"'))
    assert 1 <= len(matches) <= 3
    assert matches[0]["score"] > 0.3
