"""Which modules of `training` may import which: the layers of the package."""

from pathlib import Path

import pytest

import training
from tests.contract.test_imports import imported

ROOT = Path(training.__file__).parent


@pytest.mark.parametrize(
    ("module", "importers"),
    [
        ("__main__", set()),
        ("api", {"__init__.py"}),
        ("batch_prediction", {"__main__.py", "api.py", "batch_prediction"}),
        ("converter", {"__main__.py", "converter"}),
        (
            "exporter",
            {"__main__.py", "api.py", "batch_prediction", "command_options.py", "converter", "exporter", "importer"},
        ),
        ("importer", {"__main__.py", "api.py", "importer"}),
        ("trainer", {"__main__.py", "api.py", "exporter"}),
        ("callbacks", {"trainer.py"}),
        ("loops", {"trainer.py", "loops"}),
        ("evaluation", {"trainer.py", "evaluation", "importer"}),
    ],
)
def test_a_module_is_imported_only_by_the_layers_above(module, importers):
    name = f"training.{module}"
    found = {
        path.relative_to(ROOT).parts[0]
        for path in ROOT.rglob("*.py")
        if any(other == name or other.startswith(f"{name}.") for other in imported(path, in_full=True))
    }
    assert found == importers
