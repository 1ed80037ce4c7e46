"""`POST /predict`, the route for people: pictures in, labels and probabilities out."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flask import Blueprint, Response, current_app, g, request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from image_formats.png import is_opaque_and_upright
from serving.api.model_choice import choose_version
from serving.api.open_inference.tensors import quote
from serving.api.predict.multipart import read_files
from serving.api.responses import json_response
from serving.errors import (
    InvalidRequest,
    ModelNotFound,
    ModelNotNamed,
    ServingError,
    TooLarge,
    UnreadableImages,
    UnsupportedMedia,
)
from serving.greenlets import SMALL_BYTES, offload, run_sized
from serving.images.decode_cost import decode_cost, is_quick
from serving.images.decoding import check_file, read_image
from serving.images.limits import ImageLimits
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE, Predictor
from serving.metrics import Metrics
from serving.request_context import current_request
from serving.settings import Settings

blueprint = Blueprint("upload", __name__)

QUERY_PARAMETERS = ("model", "version", "label")

MAX_FORM_FIELDS = 100  # beside the pictures
FORM_COPIES = 2  # of a form's bytes, while it is parsed
FEW_PICTURES = 8  # decoded without a change of thread, if each is quick
PROBABILITY_BYTES = 128  # of a probability with its class's name

FILES_SIGNATURE = "image_bytes"  # of exported models, and its input: files in place of pixels
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # then width and height, four bytes each


@dataclass(frozen=True)
class Picture:
    """One picture as it was sent; `file` is its name, None in a raw body."""

    file: str | None
    data: bytes


@blueprint.post("/predict")
def predict() -> Response:
    """Classify the pictures of a multipart form, or the one picture that is the body.

    Query: `model`, which may be left out where there is one; `version` or `label`, by default the newest version.
    """
    mimetype = (request.content_type or "").partition(";")[0].strip().lower()
    if mimetype != "multipart/form-data" and not mimetype.startswith("image/"):
        raise UnsupportedMedia(
            "send pictures as multipart/form-data (curl -F image=@cat.png), or one picture as the body "
            f"with a Content-Type of image/*; got {mimetype or 'no Content-Type'}"
        )
    version = _find_model()
    g.model = version.name
    size = picture_size(version.predictor, model=version.name)
    pictures = _read_form() if mimetype == "multipart/form-data" else [_read_body()]
    started_s = decoded_s = time.perf_counter()
    deadline_s = current_request.get().deadline_s
    outputs = _predict_files(version.predictor, pictures, size=size, deadline_s=deadline_s)
    if outputs is None:
        started_s = time.perf_counter()
        images = _decode(pictures, size=size)
        decoded_s = time.perf_counter()
        outputs = version.predictor.predict(DEFAULT_SIGNATURE, {"images": images}, deadline_s=deadline_s)
    predicted_s = time.perf_counter()
    reply = {
        "model": {"name": version.name, "version": version.version},
        "predictions": run_sized(
            outputs["probabilities"].size * PROBABILITY_BYTES, _describe, pictures, outputs, card=version.card
        ),
        "timing_ms": {
            "decode": round((decoded_s - started_s) * 1e3, 3),
            "predict": round((predicted_s - decoded_s) * 1e3, 3),
        },
    }
    return json_response(reply)


def picture_size(predictor: Predictor, *, model: str) -> tuple[int, int]:
    """Return the (height, width) of the pictures that a model takes.

    Raises:
        InvalidRequest: its default signature is not that of a picture classifier: `images` uint8
            (n, height, width, 3) to `probabilities` (n, classes), `class_id` (n,) and `label` (n,).
    """
    signature = predictor.signatures.get(DEFAULT_SIGNATURE)
    if signature and signature.inputs.keys() == {"images"}:
        spec = signature.inputs["images"]
        ranks = {
            name: None if output.shape is None else len(output.shape) for name, output in signature.outputs.items()
        }
        match spec.dtype, spec.shape:
            case "DT_UINT8", (None, int(height), int(width), 3):
                if (
                    ranks.get("probabilities", 0) in (2, None)
                    and ranks.get("class_id", 0) in (1, None)
                    and ranks.get("label", 0) in (1, None)
                ):
                    return height, width
    raise InvalidRequest(
        f"model {model} does not take pictures: that needs a signature {DEFAULT_SIGNATURE} from images "
        "(uint8, (n, height, width, 3)) to probabilities, class_id and label. "
        f"Send it tensors at /v1/models/{model}:predict"
    )


def _find_model() -> ModelVersion:
    repository: ModelRepository = current_app.extensions["repository"]
    query = _read_query() if request.query_string else {}
    name = query.get("model")
    if name is None:
        names = repository.all_names()
        if not names:
            raise ModelNotFound("no model is served")
        if len(names) > 1:
            raise ModelNotNamed(names)
        name = names[0]
    return choose_version(repository, name, version=query.get("version"), label=query.get("label"))


def _read_query() -> dict[str, str]:
    """Return the query's parameters; what is not known is refused, as a request for another version may be meant."""
    query: dict[str, str] = {}
    for name, value in request.args.items(multi=True):
        if name not in QUERY_PARAMETERS:
            raise InvalidRequest(f"unknown query parameter {quote(name)}; there are {', '.join(QUERY_PARAMETERS)}")
        if name in query:
            raise InvalidRequest(f"the query parameter {name} is given twice")
        if not value:
            raise InvalidRequest(f"the query parameter {name} has no value")
        query[name] = value
    return query


def _read_body() -> Picture:
    return Picture(file=None, data=request.get_data(cache=False))


def _read_form() -> list[Picture]:
    settings: Settings = current_app.extensions["settings"]
    body: bytes = request.get_data(cache=False)
    if len(body) > SMALL_BYTES:
        current_request.get().reserve(FORM_COPIES * len(body))
    return run_sized(len(body), _parse_form, body, request.content_type or "", max_images=settings.max_images)


def _parse_form(body: bytes, content_type: str, *, max_images: int) -> list[Picture]:
    """Read the files of a multipart body, in the order sent."""
    form = read_files(body, content_type)
    if form and len(form) <= max_images:
        return [Picture(*file) for file in form]
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
    pictures = [Picture(file=file.filename, data=file.stream.getvalue()) for _, file in cast(list[Any], files)]
    if not pictures:
        raise InvalidRequest("no file in the form; send pictures as files: curl -F image=@cat.png")
    return pictures


def _too_many_fields() -> TooLarge:
    return TooLarge(f"too many fields in the form: at most {MAX_FORM_FIELDS} are taken beside the images")


def _predict_files(
    predictor: Predictor, pictures: list[Picture], *, size: tuple[int, int], deadline_s: float | None
) -> Mapping[str, np.ndarray] | None:
    """Leave PNG files of the model's own size to the model, which decodes them to the same pixels, outside of Python.

    Not those that may be transparent or turned: models of earlier exports drop alpha and ignore a PNG's orientation.

    Returns:
        What the model says; None where a file is another, or one cannot be read, which Pillow is then to explain.
    """
    signature = predictor.signatures.get(FILES_SIGNATURE)
    if signature is None or signature.inputs.keys() != {FILES_SIGNATURE}:
        return None
    height, width = size
    head = PNG_HEAD + struct.pack(">II", width, height)
    if not all(picture.data.startswith(head) and is_opaque_and_upright(picture.data) for picture in pictures):
        return None
    files = np.empty(len(pictures), object)
    files[:] = [picture.data for picture in pictures]
    try:
        return predictor.predict(FILES_SIGNATURE, {FILES_SIGNATURE: files}, deadline_s=deadline_s)
    except InvalidRequest:
        return None


def _decode(pictures: list[Picture], *, size: tuple[int, int]) -> np.ndarray:
    """Decode every picture to uint8 (n, height, width, 3), or report for each that cannot be read why."""
    settings: Settings = current_app.extensions["settings"]
    metrics: Metrics = current_app.extensions["metrics"]
    limits = settings.image_limits
    total_bytes = sum(len(picture.data) for picture in pictures)
    cost, are_quick = run_sized(total_bytes, _estimate, pictures, size, limits)
    if are_quick and len(pictures) <= FEW_PICTURES:  # one request at a time
        return _decode_all(pictures, size, limits, metrics)
    context = current_request.get()
    context.reserve(len(pictures) * size[0] * size[1] * 3)
    with context.reserved(cost):
        return offload(_decode_all, pictures, size, limits, metrics)


def _estimate(pictures: list[Picture], size: tuple[int, int], limits: ImageLimits) -> tuple[int, bool]:
    """Return the memory for the largest of the pictures, in bytes, and whether each is quick to decode."""
    cost, are_quick = 0, True
    for picture in pictures:
        try:
            header = check_file(picture.data, limits)
        except ServingError:
            continue  # reported in its turn
        cost = max(cost, decode_cost(header, decoder="pillow", size=size))
        are_quick = are_quick and is_quick(header)
    return cost, are_quick


def _decode_all(pictures: list[Picture], size: tuple[int, int], limits: ImageLimits, metrics: Metrics) -> np.ndarray:
    images = np.empty((len(pictures), *size, 3), np.uint8)
    problems = []
    for index, picture in enumerate(pictures):
        started_s = time.perf_counter()
        try:
            images[index] = read_image(picture.data, size=size, limits=limits)
        except TooLarge as error:
            raise TooLarge(f"{picture.file or f'image {index}'}: {error}") from error
        except InvalidRequest as error:
            problems.append({"index": index, "file": picture.file, "error": str(error)})
        metrics.observe_decode(time.perf_counter() - started_s)
    if problems:
        raise UnreadableImages(problems, image_count=len(pictures))
    return images


def _describe(
    pictures: list[Picture], outputs: Mapping[str, np.ndarray], *, card: dict[str, Any] | None
) -> list[dict[str, Any]]:
    probabilities = outputs["probabilities"]
    names = class_names(card, count=probabilities.shape[1])
    return [
        {
            "file": picture.file,
            "label": label.decode("utf-8", errors="replace"),
            "class_id": class_id,
            "confidence": confidence,
            "probabilities": dict(zip(names, row, strict=True)),
        }
        for picture, label, class_id, confidence, row in zip(
            pictures,
            outputs["label"],
            outputs["class_id"],
            np.maximum.reduce(probabilities, axis=1),
            probabilities,
            strict=True,
        )
    ]


def class_names(card: dict[str, Any] | None, *, count: int) -> list[str]:
    """Return the names that a model's card gives its `count` classes, else their numbers."""
    names = (card or {}).get("class_names")
    if isinstance(names, list) and len(names) == count == len({str(name) for name in names}):
        return [str(name) for name in names]
    return [str(class_id) for class_id in range(count)]
