"""Checks encoded images in string tensors before TensorFlow decodes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from image_formats.content import read_header
from image_formats.header import ImageHeader
from serving.errors import InvalidRequest, TooLarge
from serving.greenlets import run_sized
from serving.images.limits import QUICK_S, ImageLimits, check_image, decode_cost, decode_seconds
from serving.inference.signatures import Predictor, Signature
from serving.request_context import current_request

# A session without inter-op threads runs `tf.map_fn` in one thread, but starts an image before the previous one is
# done. Up to 20 images of each measured format took less than 3 times the memory of one image.
IMAGES_AT_ONCE = 3

# Smaller amounts are not reserved in the memory budget: the number of concurrent model calls limits them.
UNCOUNTED_BYTES = 2 * 1024 * 1024

MAX_QUICK_FILES = 128  # more files count as slow, however small they are
_ELEMENT_BYTES = 512  # reading a header takes as long as parsing this many bytes


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    """Memory and time to decode the images in the string tensors of one call; 0 without images."""

    memory_bytes: int  # an upper bound
    seconds: float  # on one core


def check_encoded_images(arrays: Iterable[np.ndarray], limits: ImageLimits) -> DecodeEstimate:
    """Check every element of string tensors (the inputs of one call) that has the signature of an image file.

    Raises:
        TooLarge: an image has too many pixels or frames, or a side is too long.
        InvalidRequest: an image has too many scans or other parts.
    """
    memory_bytes, seconds = 0, 0.0
    for array in arrays:
        costs: list[int] = []
        for index, count, header in _find_images(array):
            try:
                check_image(header, limits, decoder="tensorflow")
            except (InvalidRequest, TooLarge) as error:
                raise type(error)(f"image {index}: {error}") from error
            seconds += decode_seconds(header) * count
            # Every file is copied into the tensor; only IMAGES_AT_ONCE are decoded at a time.
            memory_bytes += header.file_bytes * count
            cost = decode_cost(header, decoder="tensorflow") - header.file_bytes
            costs += [cost] * min(count, IMAGES_AT_ONCE)
        memory_bytes += sum(sorted(costs)[-IMAGES_AT_ONCE:])
    return DecodeEstimate(memory_bytes, seconds)


def _find_images(array: np.ndarray) -> list[tuple[int, int, ImageHeader]]:
    """Return for each image: the index of its first element, the number of its elements, and its header."""
    if array.dtype != np.object_:
        return []  # not a string tensor: `check_inputs` refuses it
    elements = array.ravel().tolist()
    if len(elements) == 1:
        header = read_header(elements[0]) if isinstance(elements[0], bytes) else None
        return [(0, 1, header)] if header else []
    # The last value of a message is repeated, so a tensor may contain the same object a million times.
    counts = Counter(map(id, elements))
    images = []
    for index, data in enumerate(elements):
        if (count := counts.pop(id(data), 0)) and isinstance(data, bytes) and (header := read_header(data)):
            images.append((index, count, header))
    return images


def inspect_images(limits: ImageLimits, signature: Signature, inputs: Mapping[str, np.ndarray]) -> bool:
    """Check the images in string inputs and reserve memory for decoding them; returns True if they decode slowly.

    Raises:
        InvalidRequest, TooLarge: see `check_encoded_images`.
        Overloaded: the memory budget was exhausted until the deadline.
    """
    arrays = [inputs[name] for name, spec in signature.inputs.items() if spec.dtype == "DT_STRING"]
    if not arrays:
        return False
    files = sum([array.size for array in arrays])
    estimate = run_sized(files * _ELEMENT_BYTES, check_encoded_images, arrays, limits)
    if estimate.memory_bytes > UNCOUNTED_BYTES:
        current_request.get().reserve(estimate.memory_bytes)
    return files > MAX_QUICK_FILES or estimate.seconds > QUICK_S


class InspectedPredictor:
    """Predictor that checks the images in its inputs before it calls another predictor, for example a remote one."""

    def __init__(self, inner: Predictor, limits: ImageLimits) -> None:
        self._inner = inner
        self._limits = limits
        self.signatures: Mapping[str, Signature] = inner.signatures

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`. Also raises the errors of `inspect_images`."""
        described = self.signatures.get(signature)
        if described and described.inputs.keys() <= inputs.keys():  # otherwise the inner predictor refuses it
            inspect_images(self._limits, described, inputs)
        return self._inner.predict(signature, inputs, deadline_s=deadline_s)
