import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from training.exporter.exif_orientation import jpeg_orientation
from training.exporter.image_decoding import decode_images

HEIGHT, WIDTH = 40, 32


@pytest.fixture(scope="module")
def decode():
    return tf.function(
        lambda files: decode_images(files, height=HEIGHT, width=WIDTH),
        input_signature=[tf.TensorSpec((None,), tf.string)],
    )


@pytest.fixture(scope="module")
def orientation():
    return tf.function(jpeg_orientation, input_signature=[tf.TensorSpec((), tf.string)])


def picture(width=WIDTH, height=HEIGHT, seed=0):
    """A picture with edges, slopes and noise."""
    rng = np.random.default_rng(seed)
    slopes = np.add.outer(np.linspace(0, 200, height), np.linspace(0, 55, width))[..., None]
    pixels = slopes + rng.integers(-20, 20, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def with_orientation(number):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = number
    return exif


TRANSPARENT = picture().convert("RGBA")
TRANSPARENT.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
SAME_SIZE = {
    "jpeg 4:2:0": encoded(picture(), "JPEG", subsampling=2),
    "jpeg 4:4:4": encoded(picture(), "JPEG", subsampling=0, quality=95),
    "jpeg progressive": encoded(picture(), "JPEG", progressive=True),
    "jpeg grey": encoded(picture().convert("L"), "JPEG"),
    "jpeg cmyk": encoded(picture().convert("CMYK"), "JPEG"),
    "png": encoded(picture()),
    "png alpha": encoded(TRANSPARENT),
    "png grey": encoded(picture().convert("L")),
    "png grey alpha": encoded(TRANSPARENT.convert("LA")),
    "png black and white": encoded(picture().convert("1")),
    "png palette": encoded(picture().quantize(64)),
    "png palette transparent": encoded(picture().quantize(64), transparency=3),
}


@pytest.mark.parametrize("name", SAME_SIZE)
def test_files_of_the_model_s_size_decode_bit_identically_to_pillow(decode, name):
    by_pillow: Image.Image = Image.open(io.BytesIO(SAME_SIZE[name]))
    if by_pillow.has_transparency_data:
        by_pillow = Image.alpha_composite(Image.new("RGBA", by_pillow.size, "white"), by_pillow.convert("RGBA"))
    np.testing.assert_array_equal(decode([SAME_SIZE[name]])[0], np.asarray(by_pillow.convert("RGB")))


def test_16_bit_samples_keep_their_high_byte(decode):
    samples = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    decoded = decode([encoded(Image.fromarray(samples))])[0]
    np.testing.assert_array_equal(decoded, np.repeat((samples >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("size", [(20, 20), (32, 31), (33, 100), (400, 300), (640, 480), (1, 1)])
def test_resizing_matches_pillow_within_one_grey_level(decode, size):
    image = picture(*size)
    by_pillow = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode([encoded(image)])[0].numpy() - by_pillow).max() <= 1


def test_batch_can_mix_sizes_and_formats(decode):
    files = [encoded(picture(64, 48)), SAME_SIZE["jpeg 4:2:0"], SAME_SIZE["png grey"]]
    together = decode(files)
    assert together.dtype == tf.uint8
    for row, file in zip(together, files, strict=True):
        np.testing.assert_array_equal(row, decode([file])[0])


@pytest.mark.parametrize("number", range(10))
def test_exif_orientation_of_jpeg_is_applied(number):
    file = encoded(picture(), "JPEG", exif=with_orientation(number))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    decoded = decode_images(tf.constant([file]), height=upright.height, width=upright.width)[0]
    np.testing.assert_array_equal(decoded, np.asarray(upright))


def tiff(order, entries):
    body = struct.pack(f"{order}HIH", 42, 8, len(entries))
    for tag, value in entries:
        body += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    return (b"II" if order == "<" else b"MM") + body + b"\0\0\0\0"


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_is_read_in_both_byte_orders_and_after_other_segments(orientation, order):
    exif = b"Exif\0\0" + tiff(order, [(0x0100, 7), (0x0112, 6), (0x0128, 2)])
    file = encoded(picture(), "JPEG", exif=exif, comment=b"a comment of some length", icc_profile=b"x" * 3000)
    assert Image.open(io.BytesIO(file)).getexif()[0x0112] == 6
    assert orientation(file) == 6
    # The segments in another order: EXIF last, as some programs write it.
    start = file.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(file[start + 2 : start + 4], "big")
    tables = file.index(b"\xff\xdb", end)
    moved = file[:start] + file[end:tables] + file[start:end] + file[tables:]
    assert orientation(moved) == 6


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_exif_is_ignored(orientation, data):
    file = bytearray(encoded(picture(), "JPEG", exif=with_orientation(6))[:300])
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, 120))] = data.draw(st.integers(0, 255))
    assert 1 <= orientation(bytes(file[: data.draw(st.integers(0, 300))])) <= 8


def png_claiming(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def jpeg_claiming(width, height):
    file = bytearray(encoded(picture(), "JPEG"))
    frame = file.index(b"\xff\xc0")
    file[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(file)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "must hold JPEG or PNG"),
        (b"words", "must hold JPEG or PNG"),
        (encoded(picture(), "GIF"), "must hold JPEG or PNG"),
        (encoded(picture(), "BMP"), "must hold JPEG or PNG"),
        (encoded(picture(), "WEBP"), "must hold JPEG or PNG"),
        (SAME_SIZE["jpeg 4:2:0"][:200], "JPEG"),
        (SAME_SIZE["jpeg 4:2:0"][:-200], "JPEG"),
        (SAME_SIZE["png"][:20], "PNG"),
        (SAME_SIZE["png"][:200], "PNG"),
        (png_claiming(60_000, 60_000), "at most 50000000 pixels"),
        (png_claiming(2**31 + 5, 1), "at most 50000000 pixels"),
        (jpeg_claiming(65_000, 65_000), "at most 50000000 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unusable_files_are_rejected(decode, file, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        decode([SAME_SIZE["png"], file])
