"""Decode and resize encoded images inside a TensorFlow graph, as Pillow would outside it.

Every server that loads the exported model decodes with these operations, so they are chosen to agree with
Pillow: the accurate DCT gives its pixels bit for bit (the default is off by up to 8 levels), antialiased bilinear
resizing is its `BILINEAR` to within one level, and the EXIF orientation of JPEG files is honoured, as cameras and
phones expect.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import tensorflow as tf

# 50 megapixels, more than most cameras make; a small file that claims to be larger is refused before it is decoded.
MAX_PIXELS = 50_000_000
# EXIF comes first in a JPEG file and is at most 64 KiB; other segments may stand before it.
_EXIF_SEARCH_BYTES = 1 << 18
_ORIENTATION_TAG = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def decode_images(image_bytes: tf.Tensor, *, height: int, width: int) -> tf.Tensor:
    """Decode a batch of JPEG or PNG files.

    Args:
        image_bytes: string (n,), encoded images of any size.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        uint8 (n, height, width, 3). Alpha is dropped, grey repeated, 16-bit samples keep their high byte.

    Raises:
        tf.errors.InvalidArgumentError: a file is neither JPEG nor PNG, damaged, or larger than `MAX_PIXELS`.
    """
    # Small PNG files of the model's own size are what most clients send, and need nothing but decoding: the checks and
    # branches of the general way cost several times what the decoder does.
    head = _PNG_SIGNATURE + b"\0\0\0\rIHDR" + struct.pack(">II", width, height)
    are_exact = tf.reduce_all(tf.equal(tf.strings.substr(image_bytes, 0, len(head)), head))
    shape = (height, width, 3)
    return tf.cond(
        are_exact,
        lambda: _decode_exact_png(image_bytes, shape),
        lambda: _map_images(lambda data: _decode(data, height=height, width=width), image_bytes, shape),
    )


def _decode_exact_png(image_bytes: tf.Tensor, shape: tuple[int, int, int]) -> tf.Tensor:
    def decode(data: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.io.decode_png(data, channels=3), shape)

    return tf.cond(
        tf.equal(tf.size(image_bytes), 1),  # a loop costs a lone image a tenth of its time
        lambda: tf.expand_dims(decode(image_bytes[0]), 0),
        lambda: _map_images(decode, image_bytes, shape),
    )


def _map_images(
    decode: Callable[[tf.Tensor], tf.Tensor], image_bytes: tf.Tensor, shape: tuple[int, int, int]
) -> tf.Tensor:
    return tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec(shape, tf.uint8))


def _decode(data: tf.Tensor, *, height: int, width: int) -> tf.Tensor:
    is_jpeg = tf.equal(tf.strings.substr(data, 0, 3), b"\xff\xd8\xff")
    is_png = tf.equal(tf.strings.substr(data, 0, 8), _PNG_SIGNATURE)
    # Without this the operation below would take other formats too, some of them with a surprising rank.
    # The message quotes nothing of the file: TensorFlow in Python fails on a message that is not UTF-8.
    known = tf.debugging.Assert(is_jpeg | is_png, ["image_bytes must hold JPEG or PNG files"])
    with tf.control_dependencies([known]):
        data = tf.identity(data)
    pixels = tf.cond(is_jpeg, lambda: _jpeg_pixels(data), lambda: _png_pixels(data))
    small_enough = tf.debugging.Assert(
        pixels <= MAX_PIXELS,
        [f"image_bytes must hold images of at most {MAX_PIXELS} pixels; this one has", pixels],
    )
    with tf.control_dependencies([small_enough]):
        data = tf.identity(data)
    image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")  # decodes PNG as well
    orientation = tf.cond(is_jpeg, lambda: exif_orientation(data), lambda: tf.constant(1))
    image = tf.ensure_shape(_turn_upright(image, orientation), (None, None, 3))
    resized = tf.image.resize(image, (height, width), method="bilinear", antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


def _jpeg_pixels(data: tf.Tensor) -> tf.Tensor:
    return tf.reduce_prod(tf.io.extract_jpeg_shape(data, output_type=tf.int64)[:2])


def _png_pixels(data: tf.Tensor) -> tf.Tensor:
    # Width and height stand at byte 16, 32 bits each with the high byte first (the PNG specification, section 11.2.2).
    # A file that ends before them is padded here, and refused by the decoder.
    data = tf.strings.substr(tf.strings.join([data, b"\0" * 24]), 16, 8)
    size = tf.bitcast(tf.io.decode_raw(data, tf.int32, little_endian=False), tf.uint32)
    return tf.reduce_prod(tf.cast(size, tf.int64))


def exif_orientation(data: tf.Tensor) -> tf.Tensor:
    """Return the EXIF orientation of a JPEG file, int32 from 1 (upright) to 8; 1 where there is none.

    Args:
        data: string scalar, the file.

    The layout is that of the Exif standard (CIPA DC-008, sections 4.5 and 4.6): an APP1 segment that begins with
    "Exif" and two zeros, and in it a TIFF header, whose first directory holds tag 0x0112. Damaged EXIF data is no
    error: what cannot be read counts as upright.
    """
    data = tf.strings.join([tf.strings.substr(data, 0, _EXIF_SEARCH_BYTES), b"\0"])  # never empty
    head = tf.cast(tf.io.decode_raw(data, tf.uint8), tf.int64)
    size = tf.size(head, out_type=tf.int64)

    def byte(position: tf.Tensor) -> tf.Tensor:
        # Positions come from the file and may lie: beyond the end there are only zeros.
        inside = (position >= 0) & (position < size)
        return tf.where(inside, tf.gather(head, tf.where(inside, position, 0)), 0)

    def uint16(position: tf.Tensor) -> tf.Tensor:
        return 256 * byte(position) + byte(position + 1)

    # Walk from segment to segment until the EXIF segment, the image data (0xDA), or something that is no segment.
    def is_exif(position: tf.Tensor) -> tf.Tensor:
        starts = tf.strings.substr(data, tf.cast(tf.minimum(position + 4, size), tf.int32), 6)
        return tf.equal(byte(position + 1), 0xE1) & tf.equal(starts, b"Exif\0\0")

    def goes_on(position: tf.Tensor) -> tf.Tensor:
        is_segment = tf.equal(byte(position), 0xFF) & tf.not_equal(byte(position + 1), 0xDA)
        return is_segment & ~is_exif(position) & (position < size)

    start = tf.constant(2, tf.int64)
    (segment,) = tf.while_loop(goes_on, lambda position: (position + 2 + uint16(position + 2),), (start,))
    tiff = segment + 10
    little_endian = tf.equal(byte(tiff), ord("I"))

    def ordered_uint16(position: tf.Tensor) -> tf.Tensor:
        swapped = byte(position) + 256 * byte(position + 1)
        return tf.where(little_endian, swapped, uint16(position))

    low, high = ordered_uint16(tiff + 4), ordered_uint16(tiff + 6)
    offset = tf.where(little_endian, low + 65536 * high, 65536 * low + high)
    entries = tiff + offset + 2 + 12 * tf.range(ordered_uint16(tiff + offset))
    tags, values = ordered_uint16(entries), ordered_uint16(entries + 8)
    # The largest wins where a broken file repeats the tag; 0, where there is none, is no orientation.
    orientation = tf.reduce_max(tf.where(tf.equal(tags, _ORIENTATION_TAG), values, 0), axis=0)
    valid = is_exif(segment) & (orientation >= 1) & (orientation <= 8)
    return tf.cast(tf.where(valid, orientation, 1), tf.int32)


def _turn_upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    # 5 to 8 were stored on their side.
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    flip_columns = tf.reduce_any(tf.equal(orientation, [2, 3, 6, 7]))
    flip_rows = tf.reduce_any(tf.equal(orientation, [3, 4, 7, 8]))
    image = tf.cond(flip_columns, lambda: tf.reverse(image, [1]), lambda: image)
    return tf.cond(flip_rows, lambda: tf.reverse(image, [0]), lambda: image)
