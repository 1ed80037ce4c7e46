"""Loading images: what is sent for each form, and what is rejected before it is sent."""

from __future__ import annotations

import io
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client import images
from client.images import LoadedImage, find_images, load_image
from client.predictions import Failure
from image_formats.files import MAX_FILE_BYTES
from tests.client.conftest import pixels_of, png_of, write_png

NOISE = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)


def load(source: images.ImageSource) -> LoadedImage:
    image = load_image(source, index=0)
    assert isinstance(image, LoadedImage)
    return image


def why_rejected(source: images.ImageSource) -> str:
    failure = load_image(source, index=5)
    assert isinstance(failure, Failure)
    assert failure.index == 5
    return failure.reason


def sent(source: images.ImageSource) -> Image.Image:
    return Image.open(io.BytesIO(load(source).data))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pillow_images_are_sent_lossless(mode: str) -> None:
    image = Image.fromarray(NOISE).convert(mode)
    received = sent(image)
    assert (received.format, received.mode) == ("PNG", mode)
    np.testing.assert_array_equal(np.asarray(received.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_16_bit_grey_is_sent_lossless() -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (9, 14), np.uint16)
    np.testing.assert_array_equal(np.asarray(sent(Image.fromarray(samples))), samples)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_pillow_images_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.webp"
    Image.fromarray(NOISE).save(path, exif=exif, lossless=True)
    with Image.open(path) as image:
        received = sent(image)
    turned = {
        1: NOISE,
        2: NOISE[:, ::-1],
        3: NOISE[::-1, ::-1],
        4: NOISE[::-1],
        5: NOISE.transpose(1, 0, 2),
        6: np.rot90(NOISE, -1),
        7: NOISE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(NOISE),
    }[orientation]
    np.testing.assert_array_equal(np.asarray(received), turned)
    assert received.getexif().get(0x0112) is None


def test_exif_orientation_of_a_png_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as image:
        np.testing.assert_array_equal(np.asarray(sent(image)), np.rot90(NOISE, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_is_ignored() -> None:
    image = Image.fromarray(NOISE)
    image.info.update(exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", transparency="nonsense")
    np.testing.assert_array_equal(np.asarray(sent(image)), NOISE)


def test_callers_image_is_not_modified() -> None:
    image = Image.fromarray(NOISE)
    image.info["dpi"] = (72, 72)
    sent(image)
    assert image.info == {"dpi": (72, 72)}


def test_array_may_be_a_view() -> None:
    np.testing.assert_array_equal(np.asarray(sent(NOISE[::-2, ::3])), NOISE[::-2, ::3])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NOISE.astype(np.float32) / 255, r"expected RGB pixels as uint8 .* not scaled; got float32 \(9, 14, 3\)"),
        (NOISE[..., 0], r"got uint8 \(9, 14\)"),
        (NOISE[..., :2], r"got uint8 \(9, 14, 2\)"),
        (NOISE[:0], r"got uint8 \(0, 14, 3\)"),
        (np.zeros(3, object), r"got object \(3,\)"),
        (Image.new("CMYK", (3, 3)), "got CMYK: convert it"),
        (Image.new("F", (3, 3)), "got F: convert it"),
        (Image.new("RGB", (0, 3)), "no pixels: 0 x 3"),
        (b"", "empty"),
        ("no\0name", "invalid file name"),
        ("a" * 5000, "cannot be read: File name too long"),
        (os.devnull, "empty"),
    ],
)
def test_rejected_images_give_the_reason(source: images.ImageSource, reason: str) -> None:
    assert re.search(reason, why_rejected(source))


def test_truncated_pillow_image_is_rejected() -> None:
    stream = io.BytesIO()
    Image.fromarray(NOISE).resize((300, 300)).save(stream, "JPEG")
    assert "truncated" in why_rejected(Image.open(io.BytesIO(stream.getvalue()[:-900])))


def test_folder_is_rejected(tmp_path: Path) -> None:
    assert "is a folder; find_images" in why_rejected(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_rejected(tmp_path: Path) -> None:
    path = write_png(tmp_path / "secret.png", "red")
    path.chmod(0)
    assert "cannot be read: Permission denied" in why_rejected(path)


def test_file_size_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    for source in (path, "/dev/zero"):
        assert "larger than 67,108,864 bytes" in why_rejected(source)
    os.truncate(path, MAX_FILE_BYTES)
    assert len(load(path).data) == MAX_FILE_BYTES


def test_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    original = write_png(tmp_path / "original.png", "red")
    with subprocess.Popen(["cp", original, pipe]):
        assert load(pipe).data == png_of("red")


def test_find_images_sorts_and_recognises_content(tmp_path: Path) -> None:
    found = ["a.jfif", "b.JPG", "c.jpe", "d.tif", "e", "f.png", "y/2.png", "z/1.dat"]
    skipped = ["._b.JPG", ".cache/1.png", "Thumbs.db", "__MACOSX/b.JPG", "@eaDir/b.JPG", "Icon\r", "y/._2.png"]
    for name in (*found, *skipped):
        write_png(tmp_path / name, "red")
    (tmp_path / "damaged.jpg").write_bytes(b"")  # is yielded, so that it is reported
    (tmp_path / "iphone").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")  # likewise
    (tmp_path / "notes.txt").write_bytes(b"BMW and Benz build cars in the south of Germany.")
    os.mkfifo(tmp_path / "pipe")
    names = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert names == sorted([*found, "damaged.jpg", "iphone"], key=lambda name: ("/" in name, name))


def test_find_images_does_not_follow_links_to_folders(tmp_path: Path) -> None:
    write_png(tmp_path / "sub" / "1.png", "red")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert list(find_images(tmp_path)) == [tmp_path / "sub" / "1.png"]


def test_find_images_reports_folders_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(find_images(tmp_path / "missing"))
    errors: list[OSError] = []
    assert list(find_images(tmp_path / "missing", on_error=errors.append)) == []
    assert [error.filename for error in errors] == [str(tmp_path / "missing")]


def test_every_form_gives_the_same_pixels() -> None:
    for source in (pixels_of("red"), Image.fromarray(pixels_of("red")), png_of("red")):
        np.testing.assert_array_equal(np.asarray(sent(source)), pixels_of("red"))


def test_size_of_encoded_pixels_is_limited(monkeypatch):
    monkeypatch.setattr("client.images.MAX_FILE_BYTES", 20_000)
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    assert "larger than 20,000 bytes" in why_rejected(noise)
    flat = np.zeros((90, 90, 3), np.uint8)  # larger in memory than 20,000 bytes, and not when it is sent
    assert len(load(flat).data) < 20_000
