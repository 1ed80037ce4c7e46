"""Values that the client repeats, as it does not import the service, and files that client and training skip."""

from pathlib import Path

import numpy as np
from PIL import Image

from client import find_images, images, options
from image_formats.files import SYSTEM_NAMES
from image_formats.header import MAX_PIXELS
from serving.inference import model_config
from serving.settings import Settings
from training.data import image_folder


def test_client_skips_the_system_files_that_training_skips(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    skipped = [*SYSTEM_NAMES, *map(str.upper, SYSTEM_NAMES), ".hidden.png", "._1.png", ".cache/1.png", "@eaDir/1.png"]
    for label in ("a", "b"):
        for file in [*(f"{index}.png" for index in range(4)), "below/4.png", *skipped]:
            path = tmp_path / label / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                Image.fromarray(noise).save(path, "PNG")
    dataset = image_folder.load_image_folder(tmp_path, image_size=None, seed=0)
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == [f"{label}/{file}" for label in "ab" for file in (*(f"{n}.png" for n in range(4)), "below/4.png")]
    assert len(dataset.train.images) + len(dataset.test.images) == len(found)


def test_client_has_the_services_limits() -> None:
    assert Settings.max_request_bytes == images.MAX_IMAGE_BYTES
    assert Settings.max_image_pixels == MAX_PIXELS
    assert options.DEFAULT_BATCH_SIZE == Settings.max_batch_size <= Settings.max_images
    assert options.MAX_VERSION == model_config.MAX_VERSION
