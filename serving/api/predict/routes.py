"""`POST /predict`: classifies uploaded images."""

from __future__ import annotations

import struct
import time

import numpy as np
from flask import Blueprint, Response, request

from image_formats.png import is_opaque_and_upright
from serving.api.flask_app import current_app, encoded_response
from serving.api.predict.messages import UploadedImage, is_form, parse_form, parse_query, render
from serving.api.predict.operations import describe_operations
from serving.errors import InvalidRequest, ModelNotFound, ModelNotNamed, ServingError, TooLarge, UnreadableImages
from serving.greenlets import SMALL_BYTES, offload, run_sized
from serving.images.decoding import check_file, read_image
from serving.images.limits import ImageLimits, decode_cost, is_quick
from serving.inference.image_classifier import FILES_INPUT, choose_signature, image_size
from serving.inference.repository import ModelVersion
from serving.inference.service import InferenceRequest, InferenceResult
from serving.inference.signatures import DEFAULT_SIGNATURE
from serving.metrics.predictions import PredictionMetrics
from serving.request_context import current_request

__all__ = ["blueprint", "describe_operations"]

blueprint = Blueprint("predict", __name__)

FORM_COPIES = 2  # copies of a form while it is parsed
PROBABILITY_BYTES = 128  # in a response: a class name and its probability
FEW_IMAGES = 8  # decoded on the event loop's thread, if each is quick to decode
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # followed by width and height, four bytes each


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
        pixels = _decode_images(images, size, current_app.settings.image_limits, current_app.metrics.predictions)
        decoded_s = time.perf_counter()
        signature = choose_signature(version.predictor, input_name="images") or DEFAULT_SIGNATURE
        result = current_app.inference.predict(version, InferenceRequest(signature, {"images": pixels}))
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
    return current_app.inference.resolve(name, version=query.get("version"), label=query.get("label"))


def _read_form() -> list[UploadedImage]:
    body: bytes = request.get_data(cache=False)
    if len(body) > SMALL_BYTES:
        current_request.get().reserve(FORM_COPIES * len(body))
    return run_sized(len(body), parse_form, body, request.content_type or "", current_app.settings.max_images)


def _predict_files(version: ModelVersion, images: list[UploadedImage], size: tuple[int, int]) -> InferenceResult | None:
    """Predict with the model's own image decoding (fast path); None if Pillow has to decode the images.

    The fast path excludes images that may be transparent or rotated, because older exports drop alpha and ignore a
    PNG's EXIF orientation. It also leaves error messages to Pillow.
    """
    signature = choose_signature(version.predictor, input_name=FILES_INPUT)
    if signature is None or not _are_exact_pngs(images, size):
        return None
    files = np.array([image.data for image in images], object)
    try:
        return current_app.inference.predict(version, InferenceRequest(signature, {FILES_INPUT: files}))
    except InvalidRequest:
        return None


def _are_exact_pngs(images: list[UploadedImage], size: tuple[int, int]) -> bool:
    """Return whether all images are opaque, upright PNGs of exactly this (height, width).

    The model decodes these to the same pixels as Pillow, without the GIL.
    """
    head = PNG_HEAD + struct.pack(">II", *reversed(size))
    return all(image.data.startswith(head) and is_opaque_and_upright(image.data) for image in images)


def _decode_images(
    images: list[UploadedImage], size: tuple[int, int], limits: ImageLimits, metrics: PredictionMetrics
) -> np.ndarray:
    """Decode images to uint8 (n, height, width, 3), within the memory budget."""
    total_bytes = sum(len(image.data) for image in images)
    cost, are_quick = run_sized(total_bytes, _estimate, images, size, limits)
    if are_quick and len(images) <= FEW_IMAGES:  # on the event loop's thread, so only one at a time takes memory
        return _decode_all(images, size, limits, metrics)
    context = current_request.get()
    context.reserve(len(images) * size[0] * size[1] * 3)
    with context.reserved(cost):
        return offload(_decode_all, images, size, limits, metrics)


def _estimate(images: list[UploadedImage], size: tuple[int, int], limits: ImageLimits) -> tuple[int, bool]:
    """Return the memory to decode the most expensive image, in bytes, and whether each is quick to decode."""
    cost, are_quick = 0, True
    for image in images:
        try:
            header = check_file(image.data, limits)
        except ServingError:
            continue  # `_decode_all` reports it
        cost = max(cost, decode_cost(header, decoder="pillow", size=size))
        are_quick = are_quick and is_quick(header)
    return cost, are_quick


def _decode_all(
    images: list[UploadedImage], size: tuple[int, int], limits: ImageLimits, metrics: PredictionMetrics
) -> np.ndarray:
    pixels = np.empty((len(images), *size, 3), np.uint8)
    problems = []
    for index, image in enumerate(images):
        started_s = time.perf_counter()
        try:
            pixels[index] = read_image(image.data, size=size, limits=limits)
        except TooLarge as error:
            raise TooLarge(f"{image.file or f'image {index}'}: {error}") from error
        except InvalidRequest as error:
            problems.append({"index": index, "file": image.file, "error": str(error)})
        metrics.observe_decode(time.perf_counter() - started_s)
    if problems:
        raise UnreadableImages(problems, image_count=len(images))
    return pixels
