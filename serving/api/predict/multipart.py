"""The common case of an upload, straight to its files: a multipart form (RFC 7578) that is here whole.

Whatever is not written as curl, browsers and the clients' libraries write it is left to the parser that knows all of
the format, and what to say of forms that are none.
"""

from __future__ import annotations

import re

_BOUNDARY = re.compile(r"multipart/form-data; ?boundary=\"?([0-9A-Za-z'()+_,./:=? -]{1,70})\"?", re.IGNORECASE)
_PART = re.compile(
    rb'\r\nContent-Disposition: form-data; name="[^"\\\r\n]*"; filename="([^"\\%\r\n]+)"\r\n'
    rb"(?:Content-Type: [^\r\n]*\r\n)?\r\n",
    re.IGNORECASE,
)


def read_files(body: bytes, content_type: str) -> list[tuple[str, bytes]] | None:
    """Read the files of a form that holds nothing but files.

    Args:
        body: the whole of it.
        content_type: the request's.

    Returns:
        The name and content of each, in the order sent; None for any other form.
    """
    boundary = _BOUNDARY.fullmatch(content_type)
    if not boundary:
        return None
    delimiter = b"\r\n--" + boundary[1].encode()
    before, *parts = (b"\r\n" + body).split(delimiter)
    if before or not parts or parts.pop() not in (b"--\r\n", b"--"):
        return None
    if body.count(delimiter[2:]) != len(parts) + 1:
        return None  # one stands behind something else than a line's end, as werkzeug sees it
    files = []
    for part in parts:
        head = _PART.match(part)
        if not head:
            return None
        try:
            files.append((head[1].decode(), part[head.end() :]))
        except UnicodeDecodeError:
            return None
    return files
