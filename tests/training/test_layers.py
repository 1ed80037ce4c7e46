"""Which modules of `training` may import which: the layers of the package."""

import ast
from pathlib import Path

import pytest

import training

ROOT = Path(training.__file__).parent


def imports(path):
    """The modules of `training` that a file imports, in functions and for type checking too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("training"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("module", "importers"),
    [
        ("__main__", set()),
        ("api", {"__init__.py"}),
        ("exporter", {"__main__.py", "api.py", "exporter"}),
        ("trainer", {"__main__.py", "api.py", "exporter"}),
        ("callbacks", {"trainer.py"}),
        ("loops", {"trainer.py", "loops"}),
        ("evaluation", {"trainer.py", "evaluation"}),
    ],
)
def test_a_module_is_imported_only_by_the_layers_above(module, importers):
    name = f"training.{module}"
    found = {
        path.relative_to(ROOT).parts[0]
        for path in ROOT.rglob("*.py")
        if any(imported == name or imported.startswith(f"{name}.") for imported in imports(path))
    }
    assert found == importers
