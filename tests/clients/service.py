"""The service as the tests of clients need it: an image classifier, a model of many datatypes, and an image file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import serving
from tests.contract.test_golden_exchanges import GOLDEN
from tests.serving.saved_models import save_colour_classifier

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
IMAGE_FILE = "blue.jpg"


def make_server(folder: Path) -> serving.Server:
    """Write the models and the image into a folder; returns the server of `colours` version 7 and `multi`."""
    version = save_colour_classifier(folder / "colours" / "7")
    Image.new("RGB", (50, 40), COLOURS[2]).save(folder / IMAGE_FILE)
    return serving.Server({"colours": version, "multi": GOLDEN / "multi"})


def pixels(*classes: int) -> np.ndarray:
    """Return images of one colour each, uint8 (n, 32, 32, 3)."""
    return np.stack([np.full((32, 32, 3), COLOURS[class_id], np.uint8) for class_id in classes])
