"""Unusual image files decode to the same pixels in the service, the client, training and the exported graph."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from client.batches import require_success
from client.errors import ImageRejected
from client.images import as_jpeg_or_png, load_image
from image_formats import content
from serving.errors import InvalidRequest, TooLarge
from serving.images.decoding import read_image as read_upload
from serving.images.inspection import check_encoded_images
from serving.images.limits import ImageLimits
from tests.serving.image_files import chunk, encode, segment
from training.data.image_reading import read_image as read_training_image
from training.errors import DatasetError
from training.exporter.image_decoding import decode_images

SIDE = 64
LIMITS = ImageLimits(max_pixels=1_000_000, max_side=10_000)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def graph():
    return tf.function(
        lambda files: decode_images(files, height=SIDE, width=SIDE), input_signature=[tf.TensorSpec([None], tf.string)]
    )


def cross() -> np.ndarray:
    """Return a cross that changes under every rotation."""
    pixels = np.full((SIDE, SIDE, 3), 230, np.uint8)
    pixels[10:20, 5:60] = (10, 60, 200)
    pixels[4:50, 30:40] = (200, 30, 10)
    return pixels


CROSS = Image.fromarray(cross())
PNG, JPEG = encode(CROSS, "PNG"), encode(CROSS, "JPEG", quality=95)


def exif(kind: int = 3, order: str = ">") -> bytes:
    value = struct.pack(order + {3: "Hxx", 4: "I", 1: "Bxxx"}[kind], 6)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)


def jpeg_with(*parts: bytes, file: bytes = JPEG) -> bytes:
    return file[:2] + b"".join(parts) + file[2:]


def png_with(*parts: bytes, file: bytes = PNG) -> bytes:
    return file[:33] + b"".join(parts) + file[33:]


def damaged(part: bytes) -> bytes:
    return part[:-1] + bytes([part[-1] ^ 1])


def raw_png(depth: int, colour_type: int, rows: np.ndarray, *parts: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def app1(content: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + content)


UPRIGHT = {
    "long text": png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000)))),
    "long international text": png_with(chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))),
    "large profile": png_with(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2_000_000)))),
    "profile of an unknown compression": png_with(chunk(b"iCCP", b"k\0\1" + bytes(9))),
    "damaged text": png_with(damaged(chunk(b"tEXt", b"k\0v"))),
    "damaged time": png_with(damaged(chunk(b"tIME", bytes(7)))),
    "damaged transparency": png_with(damaged(chunk(b"tRNS", struct.pack(">3H", 230, 230, 230)))),
    "misplaced transparency": PNG[:-12] + chunk(b"tRNS", struct.pack(">3H", 230, 230, 230)) + PNG[-12:],
    "jpeg with garbage": jpeg_with(segment(0xFE), bytes(300)),
    "jpeg with exif in other text": jpeg_with(segment(0xFE, b"Exif\0\0" + exif())),
    "damaged exif": jpeg_with(app1(b"MM\0*\xff\xff\xff\xff")),
}
SIDEWAYS = {
    "big-endian LONG": jpeg_with(app1(exif(4))),
    "little-endian LONG": jpeg_with(app1(exif(4, "<"))),
    "BYTE": jpeg_with(app1(exif(1))),
    "after fill bytes": jpeg_with(b"\xff" * 7 + app1(exif())),
    "after many fill bytes": jpeg_with(segment(0xFE), b"\xff" * 3_000, app1(exif())),
    "after garbage": jpeg_with(segment(0xFE), bytes(50_000), app1(exif())),
    "after 650 KB of segments": jpeg_with(*[segment(0xE2, bytes(65_000))] * 10, app1(exif())),
    "after other text": jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"), app1(exif())),
    "first of two": jpeg_with(app1(exif()), app1(exif().replace(b"\0\6", b"\0\3"))),
    "png": png_with(chunk(b"eXIf", exif())),
    "png, with a JPEG's EXIF prefix": png_with(chunk(b"eXIf", b"Exif\0\0" + exif(4, "<"))),
    "png after text": png_with(chunk(b"tEXt", b"k\0" + bytes(300_000)), chunk(b"eXIf", exif())),
}


def test_much_compressed_text_is_refused_only_where_it_would_be_inflated():
    """docs/limits.md says why: the service skips the text, and TensorFlow inflates all of it."""
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8_000_000)))
    for count in (4, 5):
        data = png_with(*[text] * count)
        np.testing.assert_array_equal(read_upload(data, size=(SIDE, SIDE), limits=LIMITS), cross())
        np.testing.assert_array_equal(read_training_image(io.BytesIO(data), image_size=None), cross())
        encoded = [np.array([data], object)]
        if count == 4:
            check_encoded_images(encoded, LIMITS)
        else:
            with pytest.raises(TooLarge, match="image 0: the PNG file has too much compressed text"):
                check_encoded_images(encoded, LIMITS)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None].astype(float)
    blended: np.ndarray = np.round((colour * alpha + 255 * (255 - alpha)) / 255)
    return blended.astype(np.uint8)


ALPHA = np.asarray(Image.linear_gradient("L").resize((SIDE, SIDE)))
GREY = np.asarray(CROSS.convert("L"))
BITS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
PALETTE = CROSS.quantize(4)
DEEP = np.random.default_rng(0).integers(0, 3, (SIDE, SIDE, 3)) + 0x1200
ROWS16, GREY16 = DEEP.astype(">u2").reshape(SIDE, -1), DEEP[..., 0].astype(">u2")


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image


def unpack(bits: int) -> np.ndarray:
    """Return the first 64 samples of each row of `BITS`, of `bits` bits each."""
    rows = np.unpackbits(BITS[:, : SIDE * bits // 8], axis=1).reshape(SIDE, SIDE, bits)
    return rows @ (1 << np.arange(bits)[::-1])


def packed(bits: int, colour: int) -> tuple[bytes, np.ndarray]:
    samples = unpack(bits)
    most = (1 << bits) - 1
    rows = BITS[:, : SIDE * bits // 8]
    shown = np.where(samples == colour & most, 255, samples * (255 // most)).astype(np.uint8)
    return raw_png(bits, 0, rows, chunk(b"tRNS", struct.pack(">H", colour))), np.repeat(shown[..., None], 3, axis=2)


def deep_colour() -> np.ndarray:
    is_transparent = (DEEP == (0x1201, 0x1200, 0x1202)).all(axis=2)
    assert is_transparent.any()
    return np.where(is_transparent[..., None], 255, 0x12).astype(np.uint8).repeat(3, axis=2)


TRANSPARENT = {
    "rgba": (encode(with_alpha(CROSS), "PNG"), over_white(cross(), ALPHA)),
    "grey with alpha": (
        encode(with_alpha(CROSS.convert("L")), "PNG"),
        over_white(np.repeat(GREY[..., None], 3, axis=2), ALPHA),
    ),
    "rgb with a transparent colour": (
        encode(CROSS, "PNG", transparency=(10, 60, 200)),
        np.where((cross() == (10, 60, 200)).all(axis=2)[..., None], 255, cross()).astype(np.uint8),
    ),
    "palette": (
        encode(PALETTE, "PNG", transparency=bytes([0, 128, 255, 255]), bits=2),
        over_white(np.asarray(PALETTE.convert("RGB")), np.array([0, 128, 255, 255])[np.asarray(PALETTE)]),
    ),
    "1 bit": packed(1, 1),
    "2 bits": packed(2, 2),
    "4 bits": packed(4, 0x105),
    "8 bits": packed(8, int(BITS[0, 0])),
    "16-bit grey": (
        raw_png(16, 0, GREY16, chunk(b"tRNS", struct.pack(">H", 0x1201))),
        np.where(GREY16 == 0x1201, 255, 0x12).astype(np.uint8)[..., None].repeat(3, axis=2),
    ),
    "16-bit rgb": (raw_png(16, 2, ROWS16, chunk(b"tRNS", struct.pack(">3H", 0x1201, 0x1200, 0x1202))), deep_colour()),
    "damaged transparency of 2 bits": (
        raw_png(2, 0, BITS[:, :16], damaged(chunk(b"tRNS", b"\0\2"))),
        np.repeat((unpack(2) * 85).astype(np.uint8)[..., None], 3, axis=2),
    ),
    "with an EXIF orientation": (
        encode(with_alpha(CROSS), "PNG", exif=exif()),
        np.rot90(over_white(cross(), ALPHA), -1),
    ),
}
PLAIN = {data[:3]: np.asarray(Image.open(io.BytesIO(data))) for data in (PNG, JPEG)}
CASES = (
    {name: (data, PLAIN[data[:3]]) for name, data in UPRIGHT.items()}
    | {f"sideways: {name}": (data, np.rot90(PLAIN[data[:3]], -1)) for name, data in SIDEWAYS.items()}
    | {f"transparent: {name}": case for name, case in TRANSPARENT.items()}
)


def send(data):
    """Return the image that the gRPC client sends."""
    return require_success(as_jpeg_or_png(load_image(data, index=0)))


@pytest.mark.parametrize("name", CASES)
def test_every_decoder_reads_the_same_pixels(graph, name):
    data, expected = CASES[name]
    size = (SIDE, SIDE)
    decoded = {
        "upload": read_upload(data, size=size, limits=LIMITS),
        "training": read_training_image(io.BytesIO(data), image_size=size),
        "exported graph": graph([data])[0].numpy(),
        # The gRPC client sends the file that its own decoder returns.
        "client": graph([send(data).data])[0].numpy(),
        # A batch of several files does not take the graph's fast path.
        "exported graph, in a batch": graph([data, JPEG])[0].numpy(),
    }
    for decoder, image in decoded.items():
        np.testing.assert_array_equal(image, expected, err_msg=decoder)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_every_decoder_composites_and_rotates_other_formats(graph, kind):
    # Mostly of one colour: AVIF is lossy.
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 16))
    data = encode(image, kind, exif=b"Exif\0\0" + exif(), lossless=True, quality=100)
    expected = np.full((SIDE, SIDE, 3), 255)
    expected[:32, 48:] = 0
    read = {
        "upload": read_upload(data, size=(SIDE, SIDE), limits=LIMITS),
        "training": read_training_image(io.BytesIO(data), image_size=(SIDE, SIDE)),
        "client": graph([send(data).data])[0].numpy(),
    }
    for decoder, pixels in read.items():
        assert np.abs(pixels.astype(int) - expected).max() <= 8, decoder
        np.testing.assert_array_equal(pixels, read["upload"], err_msg=decoder)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
READERS = {
    "upload": (lambda data: read_upload(data, size=(SIDE, SIDE), limits=LIMITS), InvalidRequest),
    "training": (lambda data: read_training_image(io.BytesIO(data), image_size=None), DatasetError),
    "client": (send, ImageRejected),
}


@pytest.mark.parametrize("way", READERS)
@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_is_named_by_every_reader(way, brand):
    read, error = READERS[way]
    data = HEIC.replace(b"ftypheic", b"ftyp" + brand)
    with pytest.raises(error, match="HEIC is not supported: convert the image to JPEG or PNG"):
        read(data)


@pytest.mark.parametrize("way", READERS)
def test_avif_is_named_where_pillow_was_built_without_it(monkeypatch, way):
    """It must not be left to Pillow, which would call the file damaged."""
    data = encode(CROSS, "AVIF")
    read, error = READERS[way]
    read(data)
    monkeypatch.setattr("image_formats.content.HAS_AVIF", False)
    supported = tuple(name for name in content.SUPPORTED if name != "AVIF")
    monkeypatch.setattr("image_formats.content.SUPPORTED", supported)
    with pytest.raises(error, match="AVIF is not supported: convert the image to JPEG or PNG"):
        read(data)
    read(PNG)


DAMAGED = {
    "checksum of the pixels": damaged(PNG[:-12]) + PNG[-12:],
    "checksum of the header": PNG[:32] + bytes([PNG[32] ^ 1]) + PNG[33:],
    "no end": PNG[:-12],
    "truncated end": PNG[:-4],
    "an unknown critical chunk": png_with(chunk(b"ABCD", b"x")),
    "a chunk without a name": png_with(chunk(b"\0\1\2\3", b"x")),
    "no palette": raw_png(8, 3, BITS[:, :SIDE]),
    "header as the second chunk": PNG[:8] + chunk(b"tEXt", b"k\0v") + PNG[8:],
    "jpeg with garbage before the first segment": JPEG[:2] + b"\0" + JPEG[2:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_every_decoder_refuses_damaged_files(graph, name):
    data = DAMAGED[name]
    with pytest.raises(InvalidRequest, match=r"the image is|image format"):
        read_upload(data, size=(SIDE, SIDE), limits=LIMITS)
    with pytest.raises(DatasetError, match=r"the image is|image format"):
        read_training_image(io.BytesIO(data), image_size=None)
    with pytest.raises(tf.errors.InvalidArgumentError):
        graph([data])
