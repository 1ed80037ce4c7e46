"""Upper bound on the memory that a JSON document takes as Python objects, without parsing it."""

from __future__ import annotations

import numpy as np

# Sizes of CPython 3.11 to 3.13 on 64 bits: a list with its GC header and first allocation, a dict with its table, an
# element (its number, and its pointers in over-allocated and flattened lists), a key, and a string's header.
LIST_BYTES = 96
DICT_BYTES = 320
ELEMENT_BYTES = 72
KEY_BYTES = 256
STRING_BYTES = 192
TEXT_BYTES = 9  # per byte of a document that RapidJSON parses; includes the check of its depth
WIDE_TEXT_BYTES = 40  # per byte of a document that is not ASCII: four bytes a character, and more copies

_SLICE_BYTES = 1024 * 1024


class JsonCost:
    """Sums the cost of a document over its chunks."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._structure_bytes = 0
        self._is_ascii = True

    def add(self, chunk: bytes | memoryview) -> None:
        """Add the cost of a chunk."""
        symbols = np.frombuffer(chunk, np.uint8)
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
        """The memory that the parsed document takes, without its text."""
        return self._structure_bytes + self.size_bytes * (TEXT_BYTES if self._is_ascii else WIDE_TEXT_BYTES)


def json_cost(body: bytes | memoryview) -> int:
    """Return the memory in bytes that the parsed document takes, without its text."""
    cost = JsonCost()
    view = memoryview(body)
    for start in range(0, len(view), _SLICE_BYTES):
        cost.add(view[start : start + _SLICE_BYTES])
    return cost.total_bytes
