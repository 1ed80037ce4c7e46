"""Random weights that are the same in each run, and what keeps the tests of training short."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
from PIL import Image


def set_seed() -> None:
    """Make the weights of networks that tests build independent of the tests that ran before."""
    if keras := sys.modules.get("keras"):  # a test that builds a network has imported it
        keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def seed_of_module() -> None:
    """For the fixtures of a module, which are made before those of its first test."""
    set_seed()


@pytest.fixture(autouse=True)
def seed_of_test() -> None:
    set_seed()


@pytest.fixture(scope="module")
def blank_plots() -> Iterator[None]:
    """Reports without drawn plots: for small runs, drawing them takes longer than training.

    `evaluation/test_report.py`, `exporter/test_export_run.py` and `test_trainer.py` draw them.
    """
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.evaluation.report.render_png", lambda _: file.getvalue())
        yield
