"""What client and training repeat, as they do not import the service or each other: values, and files to skip."""

from pathlib import Path

import numpy as np
from PIL import Image

from client import find_images, options
from image_formats.files import MAX_FILE_BYTES, SYSTEM_NAMES
from image_formats.header import MAX_PIXELS
from serving.inference import image_classifier, model_config
from serving.inference.signatures import DEFAULT_SIGNATURE
from serving.settings import Settings
from training.batch_prediction import classifier, listing
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
    assert Settings.max_request_bytes == MAX_FILE_BYTES
    assert Settings.max_image_pixels == MAX_PIXELS
    assert options.DEFAULT_BATCH_SIZE == Settings.max_batch_size <= Settings.max_images
    assert options.MAX_VERSION == model_config.MAX_VERSION


def test_batch_prediction_has_the_rules_of_client_and_service(tmp_path: Path) -> None:
    assert classifier.GUARD_OUTPUTS == image_classifier.GUARD_OUTPUTS
    assert {*classifier._PIXELS, *classifier._FILES} == {
        *(image_classifier.GUARDED_SIGNATURE, image_classifier.GUARDED_FILES_SIGNATURE),
        *(image_classifier.FILES_SIGNATURE, DEFAULT_SIGNATURE),
    }
    image = Image.new("RGB", (4, 4))
    for name in ("b.png", "a.JPG", "c", "notes.txt", "B/1.png", "a/2", ".x/1.png", "@eaDir/1.png", "a/.y.png", "d.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text") if name == "notes.txt" else image.save(path, "PNG")
    (tmp_path / "damaged.webp").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = list(listing.find_images(str(tmp_path)))
    assert found == [str(path) for path in find_images(tmp_path)]
    expected = ["a.JPG", "b.png", "c", "d.gif", "damaged.webp", "B/1.png", "a/2"]
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == expected
