"""Reads the image size from the sequence headers of an AV1 stream (AV1 specification, section 5.5)."""

from __future__ import annotations

MAX_UNITS = 1_000  # of a still image, with one tile group per unit at most

_SEQUENCE_HEADER = 1


def read_sequence_size(stream: memoryview) -> tuple[int, int]:
    """Return the maximum width and height of the sequence headers in one sample, or zeros."""
    width = height = 0
    position = 0
    for _ in range(MAX_UNITS):
        if position >= len(stream):
            break
        head = stream[position]
        position += 2 if head & 4 else 1
        size = len(stream) - position
        if head & 2:
            size, position = _read_leb128(stream, position)
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            sizes = _read_size(_Bits(stream[position : position + size]))
            width, height = max(width, sizes[0]), max(height, sizes[1])
        position += size
    return width, height


class _Bits:
    """Reads bits, most significant first; bits after the end are zero."""

    def __init__(self, content: memoryview) -> None:
        self._content = bytes(content[:512])
        self._bits = int.from_bytes(self._content)
        self._left = 8 * len(self._content)

    def read(self, count: int) -> int:
        self._left -= count
        shifted = self._bits >> self._left if self._left >= 0 else self._bits << -self._left
        return shifted & ((1 << count) - 1) if self._left > -64 else 0


def _read_size(bits: _Bits) -> tuple[int, int]:
    bits.read(4)  # profile, still picture
    if bits.read(1):  # reduced header
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing info
        bits.read(64)
        if bits.read(1):
            zeros = 0
            while zeros < 32 and not bits.read(1):
                zeros += 1
            bits.read(zeros)
        if bits.read(1):  # decoder model
            delay_bits = bits.read(5) + 1
            bits.read(42)
    has_display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:  # only higher levels have tiers
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if has_display_delay and bits.read(1):
            bits.read(4)


def _read_leb128(stream: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(stream[position : position + 8]):
        value |= (byte & 127) << 7 * index
        if not byte & 128:
            return value, position + index + 1
    return value, position + 8
