"""An upper estimate of the memory that a JSON document takes as Python objects, without parsing it."""

from __future__ import annotations

import numpy as np

# CPython 3.11 to 3.13, 64 bits. A list's own structure with its collector's header and its first allocation; a dict's
# with its table; an element's pointers in the lists that hold it (over-allocated, and once more where they are
# flattened) and its number; a string's header.
LIST_BYTES = 96
DICT_BYTES = 320
ELEMENT_BYTES = 72
KEY_BYTES = 256
STRING_BYTES = 192
TEXT_BYTES = 9  # of each byte of a document that only the slower parser reads, and that is searched for its depth first
WIDE_TEXT_BYTES = 40  # where it is not ASCII: characters of four bytes each, and more copies of them

_SLICE_BYTES = 1024 * 1024


class JsonCost:
    """Adds up the cost of a document that comes in pieces."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._structure_bytes = 0
        self._is_ascii = True

    def add(self, piece: bytes | memoryview) -> None:
        """Count a piece."""
        symbols = np.frombuffer(piece, np.uint8)
        opening, objects, commas, colons, quotes = (int(np.count_nonzero(symbols == ord(c))) for c in '[{,:"')
        self.size_bytes += len(symbols)
        self._is_ascii = self._is_ascii and not (symbols > 127).any()
        self._structure_bytes += (
            opening * LIST_BYTES
            + objects * DICT_BYTES
            + (commas + opening) * ELEMENT_BYTES
            + colons * KEY_BYTES
            + quotes // 2 * STRING_BYTES
        )

    @property
    def total_bytes(self) -> int:
        """The memory that the document takes when it is parsed, without its own bytes."""
        return self._structure_bytes + self.size_bytes * (TEXT_BYTES if self._is_ascii else WIDE_TEXT_BYTES)


def json_cost(body: bytes | memoryview) -> int:
    """Return the memory in bytes that a document takes when it is parsed, without its own bytes."""
    cost = JsonCost()
    view = memoryview(body)
    for start in range(0, len(view), _SLICE_BYTES):
        cost.add(view[start : start + _SLICE_BYTES])
    return cost.total_bytes
