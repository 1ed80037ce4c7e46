"""The order of the tests."""

from __future__ import annotations

import pytest

# Files that take half a minute and more. They come first, so that of the processes that take files from one queue none
# is left with a long one at the end.
LONGEST = (
    "tests/training/test_trainer.py",
    "tests/training/test_distribution.py",
    "tests/contract/test_documented_code.py",
    "tests/training/exporter/test_saved_model.py",
    "tests/training/exporter/test_export_run.py",
    "tests/contract/test_same_prediction.py",
    "tests/serving/http/test_shutdown.py",
    "tests/training/models/test_airbench.py",
    "tests/training/test_transfer.py",
    "tests/training/test_commands.py",
    "tests/training/importer/test_tested_models.py",
    "tests/training/data/test_cifar10.py",
    "tests/e2e/test_browser.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))
