"""The package as a whole: what an import costs, what is public, who may import whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pairclip

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pairclip"

# Each module imports only from those before it.
ORDER = [
    "losses",
    "samplers",
    "similarity",
    "retrieval",
    "datasets",
    "towers",
    "embedding",
    "features",
    "evaluation",
    "history",
    "checkpoints",
    "callbacks",
    "finetuner",
    "index",
    "plots",
    "report",
]
# Private modules belong to the room that uses them first.
PRIVATE: dict[str, str] = {}
# The ground under all rooms; each file imports only from those before it.
SHARED = ["_version", "_checks", "_vectors", "_randomness", "_tensors", "_files"]
NUMERICAL = ("losses", "samplers", "similarity", "retrieval")


def room(module: str) -> str:
    return PRIVATE.get(module, module)


def own_imports(path: Path) -> set[str]:
    """Modules of pairclip that the file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pairclip"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("pairclip.")
            }
    return found


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_modules_import_only_from_those_above_them(path: Path) -> None:
    mine = room(name_of(path))
    if mine in SHARED:
        assert own_imports(path) <= set(SHARED[: SHARED.index(mine)])
        return
    position = ORDER.index(mine)
    for other in own_imports(path) - set(SHARED) - {"__version__"}:
        assert ORDER.index(room(other)) <= position, f"{path.name} imports {other}"


@pytest.mark.parametrize("module", NUMERICAL)
def test_numerical_modules_need_only_torch_numpy_and_scipy(module: str) -> None:
    for path in modules():
        if room(name_of(path)) != module:
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


def test_every_public_module_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"automodule:: pairclip\.([\w.]+)", pages))
    assert {module for module in pairclip._EXPORTS} <= documented
