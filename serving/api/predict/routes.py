"""`POST /predict`: classifies uploaded images."""

from __future__ import annotations

import time

import numpy as np
from flask import Blueprint, Response, g, request

from serving.api.flask_app import current_app, encoded_response
from serving.api.predict.decoding import are_exact_pngs, decode_images
from serving.api.predict.messages import UploadedImage, is_form, parse_form, parse_query, render
from serving.errors import InvalidRequest, ModelNotFound, ModelNotNamed
from serving.greenlets import SMALL_BYTES, run_sized
from serving.inference.image_classifier import FILES_SIGNATURE, image_size
from serving.inference.repository import ModelVersion
from serving.inference.service import InferenceRequest, InferenceResult
from serving.inference.signatures import DEFAULT_SIGNATURE
from serving.request_context import current_request

blueprint = Blueprint("predict", __name__)

FORM_COPIES = 2  # copies of a form while it is parsed
PROBABILITY_BYTES = 128  # in a response: a class name and its probability


@blueprint.post("/predict")
def predict() -> Response:
    """Classify the images of a multipart form, or a raw image body.

    Query: `model`, optional if only one model is served; `version` or `label`, by default the newest version.
    """
    has_form = is_form(request.content_type)
    version = _resolve()
    size = image_size(version.predictor, model=version.name)
    images = _read_form() if has_form else [UploadedImage(file=None, data=request.get_data(cache=False))]
    started_s = decoded_s = time.perf_counter()
    result = _predict_files(version, images, size)
    if result is None:
        started_s = time.perf_counter()
        pixels = decode_images(images, size=size, limits=current_app.settings.image_limits, metrics=current_app.metrics)
        decoded_s = time.perf_counter()
        result = current_app.inference.predict(version, InferenceRequest(DEFAULT_SIGNATURE, {"images": pixels}))
    predicted_s = time.perf_counter()
    timing_ms = {
        "decode": round((decoded_s - started_s) * 1e3, 3),
        "predict": round((predicted_s - decoded_s) * 1e3, 3),
    }
    size_bytes = result.outputs["probabilities"].size * PROBABILITY_BYTES
    return encoded_response(run_sized(size_bytes, render, images, result, timing_ms))


def _resolve() -> ModelVersion:
    query = parse_query(request.args.items(multi=True)) if request.query_string else {}
    name = query.get("model")
    if name is None:
        names = current_app.inference.repository.all_names()
        if not names:
            raise ModelNotFound("no model is served")
        if len(names) > 1:
            raise ModelNotNamed(names)
        name = names[0]
    version = current_app.inference.resolve(name, version=query.get("version"), label=query.get("label"))
    g.model = version.name
    return version


def _read_form() -> list[UploadedImage]:
    body: bytes = request.get_data(cache=False)
    if len(body) > SMALL_BYTES:
        current_request.get().reserve(FORM_COPIES * len(body))
    max_images = current_app.settings.max_images
    return run_sized(len(body), parse_form, body, request.content_type or "", max_images=max_images)


def _predict_files(version: ModelVersion, images: list[UploadedImage], size: tuple[int, int]) -> InferenceResult | None:
    """Predict with the model's own image decoding (fast path); None if Pillow has to decode the images.

    The fast path excludes images that may be transparent or rotated, because older exports drop alpha and ignore a
    PNG's EXIF orientation. It also leaves error messages to Pillow.
    """
    signature = version.predictor.signatures.get(FILES_SIGNATURE)
    if signature is None or signature.inputs.keys() != {FILES_SIGNATURE} or not are_exact_pngs(images, size):
        return None
    files = np.empty(len(images), object)
    files[:] = [image.data for image in images]
    try:
        return current_app.inference.predict(version, InferenceRequest(FILES_SIGNATURE, {FILES_SIGNATURE: files}))
    except InvalidRequest:
        return None
