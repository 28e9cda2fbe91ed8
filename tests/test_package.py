"""The package as a whole: what an import costs, what is public, who may import whom."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import pairclip

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pairclip"

# The ground that several rooms stand on, then the rooms: each imports only from those before it.
GROUND = ["_version", "_checks", "_vectors", "_randomness", "_files", "_progress"]
NUMERICAL = ["losses", "samplers", "similarity", "retrieval"]
ORDER = [
    *GROUND,
    *NUMERICAL,
    "datasets",
    "towers",
    "embedding",
    "saliency",
    "features",
    "evaluation",
    "collection",
    "alignment",
    "history",
    "checkpoints",
    "callbacks",
    "finetuner",
    "recipes",
    "index",
    "plots",
    "report",
    "command",
    "__main__",
]
LONGEST = 330  # lines of a module


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def dotted(path: Path) -> str:
    """Name of a module in the package: ``losses.forms``; a room's own is that of its folder."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in modules()}


def imports_of(path: Path, *, when_run: bool = False) -> set[str]:
    """Modules of pairclip that the file imports, wherever in the file it does so.

    With `when_run`, without those that are there for type checkers alone.
    """
    names = set()
    tree = ast.parse(path.read_text())
    for_types = [
        inside
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inside in ast.walk(node)
    ]
    for node in ast.walk(tree):
        if when_run and node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "pairclip":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pairclip."):
            module = (node.module or "").removeprefix("pairclip.")
            # Of a room one imports its face, or one of its files.
            files = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= files or {module}
        elif isinstance(node, ast.Import):
            full = {alias.name for alias in node.names if alias.name.startswith("pairclip.")}
            names |= {name.removeprefix("pairclip.") for name in full}
    return names & MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_downwards_only(name: str) -> None:
    own = name.split(".")[0]
    for other in imports_of(MODULES[name]):
        room = other.split(".")[0]
        assert ORDER.index(room) <= ORDER.index(own), other


def test_no_import_goes_in_a_circle() -> None:
    # A room's face stands for what it imports, so a file that asks its own face closes a circle.
    graph = {name: imports_of(MODULES[name], when_run=True) for name in MODULES}
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(MODULES)


def test_the_tree_hides_nothing_and_no_file_is_long() -> None:
    inside = [path for path in modules() if path.parent != SOURCE]
    assert [p for p in inside if p.name.startswith("_") and p.name != "__init__.py"] == []
    ground = {path.stem for path in SOURCE.glob("_[a-z]*")}
    assert ground == set(GROUND)
    assert len(ground) <= 6
    lengths = {dotted(path): len(path.read_text().splitlines()) for path in modules()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("module", NUMERICAL)
def test_numerical_modules_need_only_torch_numpy_and_scipy(module: str) -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] != module:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "numpy", "scipy", "pairclip", *sys.stdlib_module_names}


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, pairclip\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'matplotlib', 'scipy', 'torchvision'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []


def test_the_numerical_core_loads_neither_transformers_nor_accelerate() -> None:
    code = (
        "import sys\n"
        "from pairclip import CosinePairLoss, PairSampler, recall_at_k, similarity_matrix\n"
        "heavy = {'transformers', 'accelerate', 'matplotlib', 'torchvision'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []


def test_every_public_name_resolves_and_is_listed() -> None:
    assert pairclip.__all__ == sorted(pairclip.__all__, key=lambda n: (n != "__version__", n))
    for name in pairclip.__all__:
        value = getattr(pairclip, name)
        if name != "__version__":
            assert value.__name__ == name
            assert value.__doc__, f"{name} has no docstring"
    assert set(pairclip.__all__) <= set(dir(pairclip))


def test_type_checkers_are_told_the_same_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    told = {
        (node.module or "").removeprefix("pairclip."): {alias.asname for alias in node.names}
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pairclip.")
    }
    told.pop("_version")
    assert told == {module: set(names) for module, names in pairclip._EXPORTS.items()}


def test_unknown_names_raise_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'CosineTripletLoss'"):
        _ = pairclip.CosineTripletLoss


def test_completion_shows_public_names_and_rooms_once() -> None:
    names = dir(pairclip)
    assert len(names) == len({*names})
    assert {*pairclip.__all__} <= {*names}
    assert not [name for name in names if name[0] == "_" and name != "__version__"]
