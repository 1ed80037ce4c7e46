"""EXIF orientation of JPEG and PNG files in a TensorFlow graph, as `image_formats` reads it outside.

See the Exif standard (CIPA DC-008, sections 4.5 and 4.6) and the PNG specification. Damaged data is not an error: the
image counts as upright. Files are parsed in pieces, because converting all bytes to a tensor takes as long as decoding.
"""

from __future__ import annotations

import tensorflow as tf

MAX_STEPS = 100_000  # segments or chunks that are parsed
MAX_EXIF_BYTES = 1 << 16

_SEGMENT_BYTES = 10  # of a JPEG segment: marker, length, "Exif" and two zeros
_MAX_WINDOW_BYTES = 1 << 20  # searched at once for the next marker
_ENTRY_BYTES = 12
_ORIENTATION_TAG = 0x0112
_SOI, _EOI, _SOS, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1


def jpeg_orientation(data: tf.Tensor) -> tf.Tensor:
    """Return the EXIF orientation of a JPEG file, int32 from 1 (upright) to 8; 1 if there is none.

    Markers are found as in libjpeg: fill bytes and bytes between segments are skipped. The first EXIF segment before
    the first scan counts.

    Args:
        data: string scalar, the file.
    """
    size = tf.strings.length(data)

    def goes_on(position: tf.Tensor, _window: tf.Tensor, _exif: tf.Tensor) -> tf.Tensor:
        return position < size

    def step(position: tf.Tensor, window: tf.Tensor, exif: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        found = tf.io.decode_raw(tf.strings.join([tf.strings.substr(data, position, window), b"\0" * 10]), tf.uint8)
        first, second = found[:-1], found[1:]
        is_restart = (second >= 0xD0) & (second <= 0xD7)
        is_marker = tf.equal(first, 0xFF) & (second >= 2) & tf.not_equal(second, 0xFF) & ~is_restart
        index = tf.argmax(is_marker, output_type=tf.int32)
        code = tf.cast(found[1], tf.int32)
        length = 256 * tf.cast(found[2], tf.int32) + tf.cast(found[3], tf.int32)
        has_length = (code >= 0xC0) & tf.not_equal(code, _SOI) & tf.not_equal(code, _EOI)
        end = position + 2 + tf.where(has_length, tf.maximum(length, 2), 0)
        is_exif = tf.equal(code, _APP1) & tf.reduce_all(tf.equal(found[4:10], tf.constant(list(b"Exif\0\0"), tf.uint8)))
        content = tf.where(is_exif, tf.stack([position + 10, tf.maximum(end - position - 10, 0)]), exif)
        # Parse a segment, or continue at the next marker or the next window.
        is_found = tf.reduce_any(is_marker)
        elsewhere = position + tf.where(is_found, index, window - 1)
        return (
            tf.where(is_marker[0], tf.where(is_exif | tf.equal(code, _SOS), size, end), elsewhere),
            tf.where(is_found, _SEGMENT_BYTES, tf.minimum(16 * window, _MAX_WINDOW_BYTES)),
            tf.where(is_marker[0], content, exif),
        )

    _, _, exif = tf.while_loop(
        goes_on,
        step,
        (tf.constant(2), tf.constant(_SEGMENT_BYTES), tf.constant([0, 0])),
        maximum_iterations=MAX_STEPS,
        parallel_iterations=1,
    )
    return _orientation_at(data, exif)


def png_orientation(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the EXIF orientation of a PNG file, int32, and whether it has a tRNS chunk.

    Only chunks before the image data count.

    Args:
        data: string scalar, the file.
    """
    size = tf.strings.length(data)

    def goes_on(position: tf.Tensor, _exif: tf.Tensor, _has_transparency: tf.Tensor) -> tf.Tensor:
        return position + 8 <= size

    def step(
        position: tf.Tensor, exif: tf.Tensor, has_transparency: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        length = tf.io.decode_raw(tf.strings.substr(data, position, 4), tf.int32, little_endian=False)[0]
        kind = tf.strings.substr(data, position + 4, 4)
        is_first_exif = tf.equal(kind, b"eXIf") & tf.equal(exif[1], 0)
        is_last = tf.equal(kind, b"IDAT") | tf.equal(kind, b"IEND") | (length < 0) | (length > size - position - 12)
        return (
            tf.where(is_last, size, position + 12 + length),
            tf.where(is_first_exif, tf.stack([position + 8, length]), exif),
            has_transparency | tf.equal(kind, b"tRNS"),
        )

    _, exif, has_transparency = tf.while_loop(
        goes_on,
        step,
        (tf.constant(8), tf.constant([0, 0]), tf.constant(False)),
        maximum_iterations=MAX_STEPS,
        parallel_iterations=1,
    )
    return _orientation_at(data, exif), has_transparency


def _orientation_at(data: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Return the orientation in the EXIF data at [position, length]; length 0 for none."""

    def read() -> tf.Tensor:
        content = _substr(data, exif[0], exif[1])
        has_head = tf.equal(tf.strings.substr(content, 0, 6), b"Exif\0\0")
        return _exif_orientation(tf.where(has_head, _substr(content, 6, MAX_EXIF_BYTES), content))

    return tf.cond(tf.equal(exif[1], 0), lambda: tf.constant(1), read)


def _substr(data: tf.Tensor, position: tf.Tensor | int, length: tf.Tensor | int) -> tf.Tensor:
    """Return at most `MAX_EXIF_BYTES`; empty after the end, where `tf.strings.substr` fails."""
    start = tf.minimum(position, tf.strings.length(data))
    return tf.strings.substr(data, start, tf.clip_by_value(length, 0, MAX_EXIF_BYTES))


def _exif_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """Return the orientation in the first directory of a TIFF header; see `image_formats.exif`."""
    size = tf.strings.length(tiff)
    found = tf.cast(tf.io.decode_raw(tf.strings.join([tiff, b"\0" * 2 * _ENTRY_BYTES]), tf.uint8), tf.int64)
    is_little = tf.equal(tf.strings.substr(tiff, 0, 4), b"II*\0")
    is_big = tf.equal(tf.strings.substr(tiff, 0, 4), b"MM\0*")

    def integer(places: tf.Tensor, size_bytes: int) -> tf.Tensor:
        rising = [256**place for place in range(size_bytes)]
        values = tf.gather(found, places[..., None] + tf.range(size_bytes))
        powers = tf.where(is_little, tf.constant(rising, tf.int64), tf.constant(rising[::-1], tf.int64))
        return tf.reduce_sum(values * powers, axis=-1)

    directory = integer(tf.constant(4), 4)
    is_inside = (is_little | is_big) & (directory < tf.cast(size, tf.int64))
    directory = tf.cast(tf.where(is_inside, directory, 0), tf.int32)
    start = directory + 2
    count = tf.cast(integer(directory, 2), tf.int32)
    entries = tf.range(start, tf.maximum(start, tf.minimum(size, start + _ENTRY_BYTES * count)), _ENTRY_BYTES)
    kind = integer(entries + 2, 2)
    value = tf.where(
        tf.equal(kind, 4) | tf.equal(kind, 9),
        integer(entries + 8, 4),
        tf.where(tf.equal(kind, 3) | tf.equal(kind, 8), integer(entries + 8, 2), integer(entries + 8, 1)),
    )
    is_integer = tf.reduce_any(tf.equal(kind[:, None], tf.constant([1, 6, 3, 8, 4, 9], tf.int64)), axis=1)
    is_orientation = tf.equal(integer(entries, 2), _ORIENTATION_TAG) & is_integer & tf.equal(integer(entries + 4, 4), 1)
    # The last value counts if a file repeats the tag; 1 is for files without the tag.
    values = tf.concat([[1], tf.boolean_mask(value, is_orientation)], axis=0)
    orientation = values[-1]
    is_valid = is_inside & (orientation >= 1) & (orientation <= 8)
    return tf.cast(tf.where(is_valid, orientation, 1), tf.int32)
