import io
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from training.datasets import load_dataset
from training.datasets.image_folder import read_image
from training.errors import DatasetError


def save(path, *, size=(32, 32), colour=(200, 30, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def make_folder(folder, *, splits=("train", "test"), classes=("cat", "dog"), count=4, size=(32, 32)):
    for split in splits:
        for number, name in enumerate(classes):
            for image in range(count):
                save(folder / split / name / f"{image}.png", size=size, colour=(80 * number, 10 * image, 99))
    return folder


def load(folder, *, image_size=None, seed=0):
    return load_dataset("folder", data=folder, image_size=image_size, seed=seed)


def refusal(folder, **options):
    with pytest.raises(DatasetError) as error:
        load(folder, **options)
    return str(error.value)


def test_train_and_test_by_class(tmp_path):
    dataset = load(make_folder(tmp_path / "pets"))
    assert dataset.name == "pets"
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.images.shape == (8, 32, 32, 3)
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4
    assert dataset.train.images[5, 0, 0].tolist() == [80, 10, 99]


def test_one_level_is_split_by_seed_and_class(tmp_path):
    folder = make_folder(tmp_path, splits=("pets",), count=20) / "pets"
    dataset, again, other = (load(folder, seed=seed) for seed in (1, 1, 2))
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    assert np.bincount(dataset.train.labels).tolist() == [18, 18]
    assert dataset.content_hash == again.content_hash != other.content_hash
    seen = {image.tobytes() for image in (*dataset.train.images, *dataset.test.images)}
    assert len(seen) == 40


def test_a_folder_that_holds_one_is_enough(tmp_path):
    make_folder(tmp_path / "download" / "pets")
    assert load(tmp_path / "download").name == "pets"
    make_folder(tmp_path / "download" / "more")
    assert "2 such folders" in refusal(tmp_path / "download")


def test_sizes_that_differ_need_a_choice(tmp_path):
    folder = make_folder(tmp_path / "pets")
    save(folder / "train" / "dog" / "big.png", size=(60, 40))
    message = refusal(folder)
    assert "32x32 to 40x60" in message
    assert "--image-size" in message
    assert load(folder, image_size=(24, 48)).train.images.shape == (9, 24, 48, 3)


def test_train_and_test_must_be_of_one_size(tmp_path):
    folder = make_folder(tmp_path / "pets")
    shutil.rmtree(folder / "test")
    make_folder(folder, splits=("test",), size=(40, 40))
    assert "--image-size 32x32" in refusal(folder)


def test_damaged_files_are_named_all_of_them(tmp_path):
    folder = make_folder(tmp_path / "pets")
    whole = (folder / "train" / "cat" / "0.png").read_bytes()
    (folder / "train" / "cat" / "half.png").write_bytes(whole[:60])
    (folder / "train" / "dog" / "notes.txt").write_text("not a picture")
    message = refusal(folder)
    assert "2 of 10 files" in message
    assert "half.png is damaged" in message
    assert "notes.txt is not a JPEG" in message
    for number in range(9):
        (folder / "train" / "dog" / f"empty{number}.jpg").touch()
    assert "and 6 more" in refusal(folder)


def test_files_that_systems_leave_behind_are_passed_over(tmp_path):
    folder = make_folder(tmp_path / "pets")
    for name in ("train/cat/.DS_Store", "train/cat/Thumbs.db"):
        (folder / name).write_bytes(b"\0")
    (folder / "train" / ".cache").mkdir()
    assert load(folder).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "train" / "fox").mkdir(), "lacks the class 'fox'"),
        (lambda f: (f / "test" / "fox").mkdir(), "has the class 'fox' that"),
        (lambda f: [(f / s / "fox").mkdir() for s in ("train", "test")], "no images in the class 'fox'"),
        (lambda f: shutil.rmtree(f / "test"), "has train/ but no test/"),
        (lambda f: [shutil.rmtree(f / s / "dog") for s in ("train", "test")], "1 class folders"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_what_is_missing_is_named(tmp_path, change, message):
    folder = make_folder(tmp_path / "pets")
    change(folder)
    assert message in refusal(folder)


def test_too_few_images_are_refused(tmp_path):
    folder = make_folder(tmp_path, splits=("pets",), count=3) / "pets"
    (folder / "dog" / "0.png").unlink()
    assert "class 'dog'" in refusal(folder)
    assert "at least 3" in refusal(folder)


def test_a_folder_has_to_be_named():
    with pytest.raises(DatasetError, match="--data FOLDER"):
        load(None)


def test_files_are_read_as_the_exported_model_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg"))
    np.testing.assert_array_equal(read_image(tmp_path / "turned.jpg", image_size=None), np.asarray(upright))

    photo.save(tmp_path / "turned.png", exif=exif)  # nobody honours the orientation of a PNG
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", image_size=None), np.asarray(photo))

    clear = photo.convert("RGBA")
    clear.putalpha(7)
    clear.save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png", image_size=None), np.asarray(photo))

    deep = rng.integers(0, 65536, (40, 32)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", image_size=None)[..., 1], deep >> 8)

    small = read_image(tmp_path / "turned.png", image_size=(20, 24))
    np.testing.assert_array_equal(small, np.asarray(photo.resize((24, 20), Image.Resampling.BILINEAR)))


def test_a_decompression_bomb_is_refused(tmp_path):
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")
    (tmp_path / "bomb.png").write_bytes(content.getvalue())
    with pytest.raises(DatasetError, match=r"bomb\.png is refused"):
        read_image(tmp_path / "bomb.png", image_size=None)
