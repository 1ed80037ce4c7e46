"""Decodes uploaded images to pixels, within the memory budget."""

from __future__ import annotations

import struct
import time

import numpy as np

from image_formats.png import is_opaque_and_upright
from serving.api.predict.messages import UploadedImage
from serving.errors import InvalidRequest, ServingError, TooLarge, UnreadableImages
from serving.greenlets import offload, run_sized
from serving.images.decode_cost import decode_cost, is_quick
from serving.images.decoding import check_file, read_image
from serving.images.limits import ImageLimits
from serving.metrics import Metrics
from serving.request_context import current_request

FEW_IMAGES = 8  # decoded on the event loop's thread, if each is quick to decode
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # followed by width and height, four bytes each


def are_exact_pngs(images: list[UploadedImage], size: tuple[int, int]) -> bool:
    """Return whether all images are opaque, upright PNGs of exactly this (height, width).

    The model decodes these to the same pixels as Pillow, without the GIL.
    """
    height, width = size
    head = PNG_HEAD + struct.pack(">II", width, height)
    return all(image.data.startswith(head) and is_opaque_and_upright(image.data) for image in images)


def decode_images(
    images: list[UploadedImage], *, size: tuple[int, int], limits: ImageLimits, metrics: Metrics
) -> np.ndarray:
    """Decode images to uint8 (n, height, width, 3).

    Raises:
        UnreadableImages: some images cannot be decoded; names each with its reason.
        TooLarge: an image exceeds the limits.
        Overloaded: no memory was free before the deadline.
    """
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
    images: list[UploadedImage], size: tuple[int, int], limits: ImageLimits, metrics: Metrics
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
