"""What the build of the documentation checks by itself."""

import importlib.util
from pathlib import Path

CONF = Path(__file__).parents[1] / "docs" / "conf.py"


def test_a_page_that_lost_its_heading_is_noticed(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("conf", CONF)
    assert spec is not None
    assert spec.loader is not None
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    (tmp_path / "loss.html").write_text('<h1>The <code class="x">a &lt; b</code> loss<a>#</a></h1>')
    (tmp_path / "search.html").write_text("<h1>Search</h1>\n<p>Search your images</p>")
    titles = {"loss": "The a < b loss", "search": "Search your images"}
    assert conf.without_heading(titles, tmp_path) == ["search"]
