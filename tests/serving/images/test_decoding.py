from __future__ import annotations

import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from image_formats.decoding import STRIP_PIXELS
from image_formats.exif import read_orientation
from serving.errors import InvalidRequest, TooLarge
from serving.images.decoding import read_image
from serving.images.limits import ImageLimits
from tests.serving.conftest import encode, picture
from tests.serving.image_files import bmp, chunk, gif, jpeg_of_scans, png, segment, webp_canvas
from training.exporter.image_decoding import decode_images

HEIGHT, WIDTH = 40, 48


def photo(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """An image with smooth areas and edges, in all colours."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def alpha() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8))


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha())
    return image


def png_16_bit(channels: int) -> bytes:
    samples = np.random.default_rng(2).integers(0, 2**16, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    return bytes(tf.io.encode_png(samples).numpy())


def without_adobe_marker(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee")
    (length,) = struct.unpack(">H", jpeg[start + 2 : start + 4])
    return jpeg[:start] + jpeg[start + 2 + length :]


GREY = photo().convert("L")
CMYK = encode(photo().convert("CMYK"), "JPEG", quality=95)

TENSORFLOW_READS_TOO = {
    "jpeg 4:4:4": encode(photo(), "JPEG", subsampling=0),
    "jpeg 4:2:2": encode(photo(), "JPEG", subsampling=1),
    "jpeg 4:2:0": encode(photo(), "JPEG", subsampling=2),
    "jpeg 4:2:0 progressive": encode(photo(), "JPEG", subsampling=2, progressive=True),
    "jpeg low quality": encode(photo(), "JPEG", quality=10),
    "jpeg grey": encode(GREY, "JPEG"),
    "jpeg grey progressive": encode(GREY, "JPEG", progressive=True),
    "jpeg cmyk": CMYK,
    "jpeg cmyk without Adobe's marker": without_adobe_marker(CMYK),
    "png rgb": encode(photo()),
    "png rgb with a transparent colour": encode(photo(), transparency=photo().getpixel((3, 3))),
    "png rgba": encode(with_alpha(photo())),
    "png grey": encode(GREY),
    "png grey with a transparent level": encode(GREY, transparency=100),
    "png grey and alpha": encode(with_alpha(GREY)),
    "png 1-bit": encode(photo().convert("1")),
    "png palette": encode(photo().quantize(200)),
    "png palette 4-bit": encode(photo().quantize(16), bits=4),
    "png palette 2-bit": encode(photo().quantize(4), bits=2),
    "png palette 1-bit": encode(photo().quantize(2), bits=1),
    "png palette with one transparent entry": encode(photo().quantize(200), transparency=5),
    "png palette with alpha": encode(photo().quantize(200), transparency=bytes(range(200))),
    "png 16-bit grey": png_16_bit(1),
    "png 16-bit grey and alpha": png_16_bit(2),
    "png 16-bit rgb": png_16_bit(3),
    "png 16-bit rgba": png_16_bit(4),
}


def read(data: bytes, *, size: tuple[int, int] = (HEIGHT, WIDTH), max_image_pixels: int = 10**6) -> np.ndarray:
    return read_image(data, size=size, limits=ImageLimits(max_image_pixels, 100_000))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("data", TENSORFLOW_READS_TOO.values(), ids=TENSORFLOW_READS_TOO.keys())
def test_pixels_equal_those_of_the_graph(data: bytes) -> None:
    image = read(data)
    assert image.dtype == np.uint8
    assert image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(image, decode_images(tf.constant([data]), height=HEIGHT, width=WIDTH)[0])


@pytest.mark.parametrize("size", [(20, 20), (48, 40), (640, 480), (33, 31), (1, 1), (500, 3)])
def test_the_resize_equals_that_of_the_graph_within_one_grey_level(size: tuple[int, int]) -> None:
    source = photo(size=size)
    resized = tf.image.resize(np.asarray(source), (32, 32), antialias=True)
    expected = tf.cast(tf.round(resized), tf.int32).numpy()
    image = read(encode(source), size=(32, 32))
    assert image.shape == (32, 32, 3)
    assert np.abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("kind", "options"), [("BMP", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {"interlace": 1})]
)
def test_lossless_formats_preserve_the_pixels(kind: str, options: dict[str, object]) -> None:
    source = photo().quantize(200).convert("RGB")
    np.testing.assert_array_equal(read(encode(source, kind, **options)), np.asarray(source))


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (read(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP"])
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 32), "black")
    upright.paste("white", (0, 0, 16, 8))  # removes the symmetry
    turns = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in turns[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read(encode(stored, kind, exif=exif, quality=100), size=(32, 32))
    assert np.abs(image.astype(int) - np.asarray(upright)).max() <= 30


def test_the_exif_orientation_of_a_png_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    image = read(encode(photo(), exif=exif), size=(WIDTH, HEIGHT))
    np.testing.assert_array_equal(image, np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_is_ignored() -> None:
    whole = encode(photo(), "JPEG")
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"
    damaged = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]
    np.testing.assert_array_equal(read(damaged), read(whole))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    whole = encode(photo(), kind)
    for kept in (len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4):
        with pytest.raises(InvalidRequest):
            read(whole[:kept])


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "DIB"])
def test_formats_that_only_pillow_supports_are_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="expected JPEG, PNG, WebP, AVIF, BMP or GIF"):
        read(encode(photo(), kind))


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int) -> None:
    with pytest.raises(TooLarge, match="1,000,000"):
        read(png(width, height))


def test_an_image_at_the_limit_is_accepted() -> None:
    data = picture("red", (WIDTH, HEIGHT))
    assert read(data, max_image_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(TooLarge, match="48 x 40"):
        read(data, max_image_pixels=WIDTH * HEIGHT - 1)


def test_any_bytes_give_an_image_or_a_serving_error() -> None:
    rng = np.random.default_rng(3)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        whole = np.frombuffer(encode(photo(), kind), np.uint8)
        for _ in range(150):
            data = whole.copy()
            places = rng.integers(0, len(data), size=rng.integers(1, 20))
            data[places] = rng.integers(0, 256, size=len(places))
            data = data[: rng.integers(1, len(data) + 1)]
            try:
                assert read(data.tobytes()).shape == (HEIGHT, WIDTH, 3)
            except (InvalidRequest, TooLarge):
                continue


LARGE = (900, 700)  # more than one strip


@pytest.mark.parametrize("kind", ["cmyk", "cmyk without Adobe's marker", "16-bit grey"])
def test_large_images_converted_by_numpy_equal_those_of_tensorflow(kind: str) -> None:
    if kind == "16-bit grey":
        samples = np.random.default_rng(2).integers(0, 2**16, (LARGE[1], LARGE[0], 1), dtype=np.uint16)
        data = bytes(tf.io.encode_png(samples).numpy())
    else:
        data = encode(photo(size=LARGE).convert("CMYK"), "JPEG")
        data = data if kind == "cmyk" else without_adobe_marker(data)
    assert LARGE[0] * LARGE[1] > 2 * STRIP_PIXELS
    expected = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    np.testing.assert_array_equal(read(data, size=LARGE[::-1]), expected)


def exif_of_many_tags() -> bytes:
    """5,000 tags that share one value of 60 KB, which Pillow copies for each tag."""
    tags = b"".join(struct.pack(">HHII", 0x9000 + tag, 7, 59_000, 8) for tag in range(5_000))
    orientation = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 5_001) + orientation + tags


METADATA = {
    "jpeg of comments": ("JPEG", segment(0xFE) * 9_000),
    "jpeg of exif": ("JPEG", segment(0xE1, b"Exif\0\0MM\0*" + bytes(65_000)) * 150),
    "jpeg of tags": ("JPEG", segment(0xE1, exif_of_many_tags())),
    "jpeg of photoshop resources": ("JPEG", segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4" + bytes(6)) * 2_000),
    "jpeg of several pictures": ("JPEG", segment(0xE2, b"MPF\0" + exif_of_many_tags()[6:])),
    "jpeg with garbage": ("JPEG", segment(0xFE) + b"\0" * 3_000_000),
    "png of texts": ("PNG", chunk(b"tEXt", b"k\0v") * 20_000),
    "png of compressed texts": ("PNG", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))) * 60),
    "png with a damaged text": ("PNG", chunk(b"tEXt", b"k\0v")[:-1] + b"?"),
    "png with a text that Pillow takes for a frame": ("PNG", chunk(b"tEXt", b"bbox\0v")),
    "png with a broken profile": ("PNG", chunk(b"iCCP", b"k\0\1" + bytes(9))),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_dropped_before_decoding(name: str) -> None:
    kind, metadata = METADATA[name]
    whole = encode(photo(), kind)
    start = {"JPEG": 2, "PNG": 33}[kind]
    data = whole[:start] + metadata + whole[start:]
    tracemalloc.start()
    started_s = time.perf_counter()
    image = read(data)
    seconds = time.perf_counter() - started_s
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 3 * len(data) + 1_000_000
    upright = read(whole)
    if name == "jpeg of tags":
        upright = read(whole[:2] + segment(0xE1, b"Exif\0\0" + exif_of(6)) + whole[2:])
    np.testing.assert_array_equal(image, upright)


def exif_of(orientation: int) -> bytes:
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def test_many_image_data_chunks_equal_one() -> None:
    whole = encode(photo())
    (length,) = struct.unpack(">I", whole[33:37])
    pixels = whole[41 : 41 + length]
    assert whole[37:41] == b"IDAT"
    parts = b"".join(chunk(b"IDAT", pixels[place : place + 1]) for place in range(length))
    np.testing.assert_array_equal(read(whole[:33] + parts + whole[33 + 12 + length :]), read(whole))


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (exif_of(6), 6),
        (b"Exif\0\0" + exif_of(8), 8),
        (b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 3, 0, 0), 3),
        (b"MM\0*" + struct.pack(">IHHHIII", 8, 1, 0x0112, 4, 1, 6, 0), 6),  # a LONG
        (exif_of(9), 1),
        (exif_of(6)[:15], 1),
        (b"MM\0*\xff\xff\xff\xff", 1),
        (b"", 1),
        (b"Exif\0\0", 1),
    ],
)
def test_the_orientation_is_read_from_exif_data(exif: bytes, orientation: int) -> None:
    assert read_orientation(exif) == orientation


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (jpeg_of_scans(200, size=(7_000, 7_000)), InvalidRequest, "more than 100 scans"),
        (jpeg_of_scans(5_000), InvalidRequest, "more than 100 scans"),
        (png(1, 200_000), TooLarge, "a side may have at most 100,000"),
        (bmp(40_000, 40_000), TooLarge, "at most 100,000,000"),
        (webp_canvas(16_383, 16_383), TooLarge, "at most 100,000,000"),
        (gif((10, 10), 1, frame_size=(65_000, 65_000)), TooLarge, "at most 100,000,000"),
    ],
)
def test_slow_files_are_refused_by_their_header(data: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(data, max_image_pixels=100_000_000)
