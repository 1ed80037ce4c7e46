import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from training.data.image_reading import read_image
from training.errors import DatasetError

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)


def encode(image, image_format, **options):
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def read(image, image_format, *, image_size=None, **options):
    return read_image(io.BytesIO(encode(image, image_format, **options)), image_size=image_size)


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_exact_pixels(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    np.testing.assert_array_equal(read(Image.fromarray(PHOTO), image_format, **options), PHOTO)


def test_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime")]
    image = read(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image.shape == (6, 8, 3)
    assert (image == (255, 0, 0)).all()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_alpha_is_composited_over_white(image_format):
    rgba = Image.fromarray(PHOTO).convert("RGBA")
    rgba.putalpha(7)
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    expected = np.round((PHOTO * 7.0 + 255 * 248) / 255)
    np.testing.assert_array_equal(read(rgba, image_format, **options), expected)


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_the_transparent_entry_of_a_palette_is_white(image_format):
    palette = Image.fromarray(PHOTO).quantize(16)
    expected = np.where(np.asarray(palette)[..., None] == 3, 255, np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(read(palette, image_format, transparency=3), expected)


def test_grey_images_become_rgb():
    grey = PHOTO[..., 0]
    np.testing.assert_array_equal(read(Image.fromarray(grey), "PNG"), np.stack([grey] * 3, axis=2))


def test_16_bit_samples_keep_their_high_byte():
    deep = np.random.default_rng(1).integers(0, 65536, (40, 32)).astype(np.uint16)
    np.testing.assert_array_equal(read(Image.fromarray(deep), "PNG")[..., 1], deep >> 8)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "MPO"])
def test_exif_orientation_is_applied(image_format, value):
    # MPO is what many phones write as .jpg: a JPEG file with further pictures behind the first.
    more = {"save_all": True, "append_images": [Image.new("RGB", (4, 4))]} if image_format == "MPO" else {}
    content = encode(Image.fromarray(PHOTO), image_format, exif=orientation(value), **more)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    image = read_image(io.BytesIO(content), image_size=None)
    assert image.shape[:2] == ((40, 32) if value < 5 else (32, 40))
    np.testing.assert_array_equal(image, np.asarray(upright))


def test_exif_orientation_of_png_is_applied():
    np.testing.assert_array_equal(read(Image.fromarray(PHOTO), "PNG", exif=orientation(6)), np.rot90(PHOTO, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", b"nonsense", b"Exif\0\0II*\0"])
def test_damaged_exif_data_is_ignored(exif):
    assert read(Image.fromarray(PHOTO), "JPEG", exif=exif).shape == (40, 32, 3)


def test_resizing_is_antialiased_bilinear():
    small = Image.fromarray(PHOTO).resize((24, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read(Image.fromarray(PHOTO), "PNG", image_size=(20, 24)), np.asarray(small))


@pytest.mark.parametrize("size", [(7001, 7143), (20_000, 20_000)])  # just above the limit; above Pillow's as well
def test_decompression_bomb_is_rejected_and_named(tmp_path, size):
    Image.new("1", size).save(tmp_path / "bomb.png")
    with pytest.raises(DatasetError, match=r"bomb\.png: .*pixels; the maximum is 50,000,000"):
        read_image(tmp_path / "bomb.png", image_size=(32, 32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"not a picture", "unknown image format: expected JPEG, PNG, WebP, AVIF, BMP or GIF"),
        (encode(Image.fromarray(PHOTO), "TIFF"), "TIFF is not supported: convert the image to JPEG or PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not supported: convert the image to JPEG or PNG"),
        (encode(Image.fromarray(PHOTO), "JPEG")[:-400], "the image is damaged or cut off"),
    ],
)
def test_file_that_is_not_an_image_is_named(tmp_path, content, message):
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"cat\.jpg: {message}"):
        read_image(tmp_path / "cat.jpg", image_size=None)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"cat\.jpg cannot be read: No such file"):
        read_image(tmp_path / "cat.jpg", image_size=None)


WHOLE_FILES = [
    encode(image, image_format)
    for image_format in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF")
    for image in (Image.fromarray(PHOTO), Image.fromarray(PHOTO[..., 0]))
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_file_is_read_or_raises_dataset_error(data):
    content = bytearray(data.draw(st.sampled_from(WHOLE_FILES)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(content) - 1, 300)) | st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    try:
        image = read_image(io.BytesIO(content), image_size=(8, 8))
    except DatasetError:
        return
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
