"""Limits on what surrounds a request body: headers, trailers and chunk extensions."""

from __future__ import annotations

from serving.http.request import MAX_HEAD_BYTES, TOO_LARGE, RequestFault

MAX_TRAILER_BYTES = 16 * 1024  # trailers and chunk extensions
CHUNK_OVERHEAD_BYTES = 16  # framing of a chunk: its size and line breaks


class FramingLimits:
    """Counts the bytes of one connection that are not body data, to refuse headers and trailers that do not end.

    The count is per piece of parsed data, so slightly more than the limit may pass.
    """

    def __init__(self) -> None:
        self._head_bytes = 0
        self._excess_bytes = 0
        self.begin_piece()

    def begin_piece(self) -> None:
        """Reset the counts of the parser's callbacks, before the next piece is parsed."""
        self.had_event = False  # the parser found the start of a request, the end of its headers, or body data
        self.body_bytes = 0
        self.chunks = 0

    def check(self, piece_bytes: int, *, in_head: bool, in_body: bool) -> None:
        """Check the limits after a piece was parsed; raises RequestFault."""
        if in_head or not self.had_event:  # without an event: empty lines before a request
            self._head_bytes += piece_bytes
            if self._head_bytes > MAX_HEAD_BYTES:
                raise RequestFault(TOO_LARGE, f"the headers are longer than {MAX_HEAD_BYTES:,} bytes")
        else:
            self._head_bytes = 0
        # Each chunk may have its size and an extension of a few bytes.
        excess = piece_bytes - 3 * self.body_bytes - CHUNK_OVERHEAD_BYTES * self.chunks
        self._excess_bytes = max(0, self._excess_bytes + excess) if in_body else 0
        if self._excess_bytes > MAX_TRAILER_BYTES:
            raise RequestFault(TOO_LARGE, f"trailers or chunk extensions are longer than {MAX_TRAILER_BYTES:,} bytes")
