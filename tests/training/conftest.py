"""What keeps the tests of training short."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image


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
