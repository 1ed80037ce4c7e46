"""The request of `/predict` to images: the query, and the files of a form or a raw body."""

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
MAX_FORM_FIELDS = 100  # beside the images


@dataclass(frozen=True)
class UploadedImage:
    """An encoded image; `file` is its name, None in a raw body."""

    file: str | None
    data: bytes


def parse_query(arguments: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the parameters of a query.

    Raises:
        InvalidRequest: one is unknown (the client may mean another version than it would get), repeated or empty.
    """
    query: dict[str, str] = {}
    for name, value in arguments:
        if name not in QUERY_PARAMETERS:
            raise InvalidRequest(f"unknown query parameter {quote(name)}; there are {', '.join(QUERY_PARAMETERS)}")
        if name in query:
            raise InvalidRequest(f"the query parameter {name} is given twice")
        if not value:
            raise InvalidRequest(f"the query parameter {name} has no value")
        query[name] = value
    return query


def is_form(content_type: str | None) -> bool:
    """Return whether the body is a multipart form, rather than one image.

    Raises:
        UnsupportedMedia: it is neither.
    """
    mimetype = (content_type or "").partition(";")[0].strip().lower()
    if mimetype != "multipart/form-data" and not mimetype.startswith("image/"):
        raise UnsupportedMedia(
            "send pictures as multipart/form-data (curl -F image=@cat.png), or one picture as the body "
            f"with a Content-Type of image/*; got {mimetype or 'no Content-Type'}"
        )
    return mimetype == "multipart/form-data"


def parse_form(body: bytes, content_type: str, *, max_images: int) -> list[UploadedImage]:
    """Return the files of a multipart body, in the order sent.

    Raises:
        InvalidRequest: the body is malformed, or has no file.
        TooLarge: it has more than `max_images` files, or too many other fields.
    """
    form = read_files(body, content_type)
    if form and len(form) <= max_images:
        return [UploadedImage(*file) for file in form]
    boundary = parse_options_header(content_type)[1].get("boundary", "")
    count = 0

    def open_file(*_: Any, **__: Any) -> io.BytesIO:
        nonlocal count
        count += 1
        if count > max_images:
            raise TooLarge(f"too many images in one request: at most {max_images} are taken")
        return io.BytesIO()

    parser = MultiPartParser(
        stream_factory=open_file,
        # A list of pairs instead of a MultiDict, which would group the files by their field's name.
        cls=cast(Any, list),
        max_form_parts=max_images + MAX_FORM_FIELDS,
    )
    if not boundary:
        raise InvalidRequest("the multipart body's Content-Type names no boundary")
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
        raise InvalidRequest("no file in the form; send pictures as files: curl -F image=@cat.png")
    return images


def _too_many_fields() -> TooLarge:
    return TooLarge(f"too many fields in the form: at most {MAX_FORM_FIELDS} are taken beside the images")
