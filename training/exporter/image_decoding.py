"""Decode and resize encoded images inside a TensorFlow graph, as `image_formats/decoding.py` does outside it.

The operations agree with Pillow: the accurate DCT gives bit-identical pixels (the default differs by up to 8 levels),
and antialiased bilinear resizing agrees with `BILINEAR` within one level. The EXIF orientation is applied, and
transparency is composited over white.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import tensorflow as tf

from image_formats.header import MAX_PIXELS
from training.exporter.exif_orientation import jpeg_orientation, png_orientation

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Patterns for whole strings; \C is any byte. The colour type is byte 25 of a PNG.
_HAS_ALPHA = r"\C{25}[\x04\x06]\C*"
# Grey or RGB, and the image data is the first chunk after the header.
_PLAIN_HEAD = r"\C{25}[\x00\x02]\C{11}IDAT"
_PLAIN_HEAD_BYTES = 41
_EXIF = r"\C*Exif\C*"  # the name of a JPEG's EXIF segment
_SMALL_BYTES = 1 << 16
# With an alpha channel, or the name of a chunk with transparency or orientation. If the name occurs by chance, the slow
# path decodes the same image.
_TRANSPARENT_OR_TURNED = _HAS_ALPHA + r"|\C*(?:tRNS|eXIf)\C*"


def decode_images(image_bytes: tf.Tensor, *, height: int, width: int) -> tf.Tensor:
    """Decode a batch of JPEG or PNG files.

    Args:
        image_bytes: string (n,), encoded images of any size.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        uint8 (n, height, width, 3). Transparency is composited over white, grey repeated, 16-bit samples keep their
        high byte.

    Raises:
        tf.errors.InvalidArgumentError: a file is neither JPEG nor PNG, damaged, or larger than `MAX_PIXELS`.
    """
    # Fast path for opaque PNG files of the model's size, which most clients send: the checks and branches of the slow
    # path take several times as long as the decoder.
    head = _PNG_SIGNATURE + b"\0\0\0\rIHDR" + struct.pack(">II", width, height)
    are_size = tf.reduce_all(tf.equal(tf.strings.substr(image_bytes, 0, len(head)), head))
    are_exact = tf.cond(
        tf.reduce_all(_matches(tf.strings.substr(image_bytes, 0, _PLAIN_HEAD_BYTES), _PLAIN_HEAD)),
        lambda: are_size,
        lambda: are_size & ~tf.reduce_any(_matches(image_bytes, _TRANSPARENT_OR_TURNED)),
    )
    shape = (height, width, 3)
    return tf.cond(
        are_exact,
        lambda: _decode_exact_png(image_bytes, shape),
        lambda: _map_images(lambda data: _decode(data, height=height, width=width), image_bytes, shape),
    )


def _matches(data: tf.Tensor, pattern: str) -> tf.Tensor:
    return tf.strings.regex_full_match(data, pattern)


def _decode_exact_png(image_bytes: tf.Tensor, shape: tuple[int, int, int]) -> tf.Tensor:
    def decode(data: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.io.decode_png(data, channels=3), shape)

    return tf.cond(
        tf.equal(tf.size(image_bytes), 1),  # without the loop, which takes a tenth of the time of a single image
        lambda: tf.expand_dims(decode(image_bytes[0]), 0),
        lambda: _map_images(decode, image_bytes, shape),
    )


def _map_images(
    decode: Callable[[tf.Tensor], tf.Tensor], image_bytes: tf.Tensor, shape: tuple[int, int, int]
) -> tf.Tensor:
    return tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec(shape, tf.uint8))


def _decode(data: tf.Tensor, *, height: int, width: int) -> tf.Tensor:
    is_jpeg = tf.equal(tf.strings.substr(data, 0, 3), _JPEG_SIGNATURE)
    is_png = tf.equal(tf.strings.substr(data, 0, 8), _PNG_SIGNATURE)
    # The operation below would decode other formats too, some to another rank.
    # The message does not quote the file: TensorFlow in Python fails on a message that is not UTF-8.
    known = tf.debugging.Assert(
        is_jpeg | is_png, ["image_bytes must hold JPEG or PNG files; convert others first, such as HEIC or WebP"]
    )
    with tf.control_dependencies([known]):
        data = tf.identity(data)
    pixels, orientation, is_transparent = tf.cond(is_jpeg, lambda: _inspect_jpeg(data), lambda: _inspect_png(data))
    small_enough = tf.debugging.Assert(
        pixels <= MAX_PIXELS, [f"image_bytes must hold images of at most {MAX_PIXELS} pixels; this one has", pixels]
    )
    with tf.control_dependencies([small_enough]):
        data = tf.identity(data)
    image = tf.cond(
        is_transparent,
        lambda: _decode_over_white(data),
        lambda: tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"),  # decodes PNG as well
    )
    image = tf.ensure_shape(_apply_orientation(image, orientation), (None, None, 3))
    resized = tf.image.resize(image, (height, width), method="bilinear", antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


_Inspected = tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # pixels int64, orientation int32, may be transparent bool


def _inspect_jpeg(data: tf.Tensor) -> _Inspected:
    pixels = tf.reduce_prod(tf.io.extract_jpeg_shape(data, output_type=tf.int64)[:2])
    # In a small file, searching for the name is faster than parsing the segments.
    has_exif = (tf.strings.length(data) > _SMALL_BYTES) | _matches(tf.strings.substr(data, 0, _SMALL_BYTES), _EXIF)
    orientation = tf.cond(has_exif, lambda: jpeg_orientation(data), lambda: tf.constant(1))
    return pixels, orientation, tf.constant(False)


def _inspect_png(data: tf.Tensor) -> _Inspected:
    # Width and height are big-endian 32-bit integers at byte 16 (PNG specification, section 11.2.2). A shorter file is
    # padded here, and rejected by the decoder.
    head = tf.strings.substr(data, 0, _PLAIN_HEAD_BYTES)
    size = tf.strings.substr(tf.strings.join([head, b"\0" * 24]), 16, 8)
    size = tf.bitcast(tf.io.decode_raw(size, tf.int32, little_endian=False), tf.uint32)
    orientation, has_transparency = tf.cond(
        _matches(head, _PLAIN_HEAD), lambda: (tf.constant(1), tf.constant(False)), lambda: png_orientation(data)
    )
    return tf.reduce_prod(tf.cast(size, tf.int64)), orientation, has_transparency | _matches(head, _HAS_ALPHA)


def _decode_over_white(data: tf.Tensor) -> tf.Tensor:
    """Decode a PNG file with an alpha channel or a tRNS chunk, composited over white."""
    rgba = tf.cast(tf.io.decode_png(data, channels=4), tf.uint16)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    # libpng ignores a damaged tRNS chunk. For samples of fewer than 8 bits, TensorFlow then fills alpha with the
    # largest value of that many bits instead of 255.
    depth = tf.cast(tf.io.decode_raw(tf.strings.substr(data, 24, 1), tf.uint8)[0], tf.int32)
    filling = tf.cast(tf.bitwise.left_shift(1, tf.minimum(depth, 8)) - 1, tf.uint16)
    alpha = tf.where(tf.reduce_all(tf.equal(alpha, filling)), tf.constant(255, tf.uint16), alpha)
    # (colour * alpha + 255 * (255 - alpha)) / 255, rounded to nearest, in 16 bits without division.
    blended = colour * alpha + (255 * (255 - alpha) + 128)
    blended += tf.bitwise.right_shift(blended, tf.constant(8, tf.uint16))
    return tf.cast(tf.bitwise.right_shift(blended, tf.constant(8, tf.uint16)), tf.uint8)


def _apply_orientation(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    # 5 to 8 are transposed.
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    flip_columns = tf.reduce_any(tf.equal(orientation, [2, 3, 6, 7]))
    flip_rows = tf.reduce_any(tf.equal(orientation, [3, 4, 7, 8]))
    image = tf.cond(flip_columns, lambda: tf.reverse(image, [1]), lambda: image)
    return tf.cond(flip_rows, lambda: tf.reverse(image, [0]), lambda: image)
