"""Parses a `/predict` request: its query, and the images of a multipart form or a raw body."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from serving.api.predict.multipart import read_files
from serving.errors import InvalidRequest, TooLarge, UnsupportedMedia
from serving.quoting import quote

QUERY_PARAMETERS = ("model", "version", "label")
MAX_FORM_FIELDS = 100  # in addition to the images


@dataclass(frozen=True)
class UploadedImage:
    """An encoded image; `file` is its file name, None for a raw body."""

    file: str | None
    data: bytes


def parse_query(arguments: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the query parameters.

    Raises:
        InvalidRequest: a parameter is unknown, repeated or empty. To ignore a misspelled `version` would return the
            prediction of another one.
    """
    query: dict[str, str] = {}
    for name, value in arguments:
        if name not in QUERY_PARAMETERS:
            raise InvalidRequest(f"unknown query parameter {quote(name)}; expected {', '.join(QUERY_PARAMETERS)}")
        if name in query:
            raise InvalidRequest(f"the query parameter {name} is repeated")
        if not value:
            raise InvalidRequest(f"the query parameter {name} has no value")
        query[name] = value
    return query


def is_form(content_type: str | None) -> bool:
    """Return whether the body is a multipart form instead of one raw image.

    Raises:
        UnsupportedMedia: the body is neither.
    """
    mimetype = (content_type or "").partition(";")[0].strip().lower()
    if mimetype != "multipart/form-data" and not mimetype.startswith("image/"):
        raise UnsupportedMedia(
            "send images as multipart/form-data (curl -F image=@cat.png), or one image as the body "
            f"with a Content-Type of image/*; got {mimetype or 'no Content-Type'}"
        )
    return mimetype == "multipart/form-data"


def parse_form(body: bytes, content_type: str, *, max_images: int) -> list[UploadedImage]:
    """Return the files of a multipart body, in the order sent.

    Raises:
        InvalidRequest: the body is malformed or has no file.
        TooLarge: the body has more than `max_images` files, or more than MAX_FORM_FIELDS other fields.
    """
    files = read_files(body, content_type)
    if files and len(files) <= max_images:
        return [UploadedImage(*file) for file in files]
    return parse_with_werkzeug(body, content_type, max_images=max_images)


def parse_with_werkzeug(body: bytes, content_type: str, *, max_images: int) -> list[UploadedImage]:
    """Parse any form (fallback). Arguments, result and errors are those of `parse_form`."""
    boundary = parse_options_header(content_type)[1].get("boundary", "")
    if not boundary:
        raise InvalidRequest("the multipart body's Content-Type names no boundary")
    count = 0

    def open_file(*_: Any, **__: Any) -> io.BytesIO:
        nonlocal count
        count += 1
        if count > max_images:
            raise TooLarge(f"too many images in one request: at most {max_images} are accepted")
        return io.BytesIO()

    parser = MultiPartParser(
        stream_factory=open_file,
        cls=cast(Any, list),  # a list of pairs: a MultiDict would group the files by field name
        max_form_parts=max_images + MAX_FORM_FIELDS,
    )
    try:
        fields, files = parser.parse(io.BytesIO(body), boundary.encode("ascii"), len(body))
    except RequestEntityTooLarge as error:  # more parts than images and fields together
        raise _too_many_fields() from error
    except ValueError as error:
        raise InvalidRequest(f"the multipart body is malformed: {error}") from error
    if len(fields) > MAX_FORM_FIELDS:
        raise _too_many_fields()
    images = [UploadedImage(file=file.filename, data=file.stream.getvalue()) for _, file in cast(list[Any], files)]
    if not images:
        raise InvalidRequest("no file in the form; send images as files: curl -F image=@cat.png")
    return images


def _too_many_fields() -> TooLarge:
    return TooLarge(f"too many fields in the form: at most {MAX_FORM_FIELDS} are accepted in addition to the images")
