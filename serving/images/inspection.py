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
from serving.images.decode_cost import QUICK_S, decode_cost, decode_seconds
from serving.images.limits import ImageLimits, check_image
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
    """Check every element of string tensors that has the signature of an image file.

    Args:
        arrays: the string inputs of one call, object arrays of bytes.
        limits: the service's limits.

    Returns:
        Memory and time to decode the images.

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
        if len(costs) > IMAGES_AT_ONCE:
            costs = sorted(costs)[-IMAGES_AT_ONCE:]
        memory_bytes += sum(costs)
    return DecodeEstimate(memory_bytes, seconds)


def _find_images(array: np.ndarray) -> list[tuple[int, int, ImageHeader]]:
    """Find the elements that have the signature of an image file.

    A tensor may contain the same object a million times, because the last value of a message is repeated.

    Returns:
        For each image: the index of its first element, the number of its elements, and its header.
    """
    if array.dtype != np.object_:
        return []  # not a string tensor: `check_inputs` refuses it
    elements = array.ravel().tolist()
    if len(elements) == 1:
        header = read_header(elements[0]) if isinstance(elements[0], bytes) else None
        return [(0, 1, header)] if header else []
    counts = Counter(map(id, elements))
    images = []
    for index, data in enumerate(elements):
        if (count := counts.pop(id(data), 0)) and isinstance(data, bytes) and (header := read_header(data)):
            images.append((index, count, header))
    return images


class ImageInspector:
    """Checks the encoded images in the inputs of a call, and reserves memory for decoding them."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits

    def inspect(self, signature: Signature, inputs: Mapping[str, np.ndarray]) -> bool:
        """Check the images in the string inputs and reserve memory for them; returns True if they decode slowly.

        Raises:
            InvalidRequest, TooLarge: see `check_encoded_images`.
            Overloaded: the memory budget was exhausted until the deadline.
        """
        arrays = [inputs[name] for name, spec in signature.inputs.items() if spec.dtype == "DT_STRING"]
        if not arrays:
            return False
        files = sum([array.size for array in arrays])
        estimate = run_sized(files * _ELEMENT_BYTES, check_encoded_images, arrays, self._limits)
        if estimate.memory_bytes > UNCOUNTED_BYTES:
            current_request.get().reserve(estimate.memory_bytes)
        return files > MAX_QUICK_FILES or estimate.seconds > QUICK_S


class InspectedPredictor:
    """Predictor that checks the images in its inputs before it calls another predictor, for example a remote one."""

    def __init__(self, inner: Predictor, inspector: ImageInspector) -> None:
        self._inner = inner
        self._inspector = inspector
        self.signatures: Mapping[str, Signature] = inner.signatures

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`. Also raises the errors of `ImageInspector.inspect`."""
        described = self.signatures.get(signature)
        if described and described.inputs.keys() <= inputs.keys():  # otherwise the inner predictor refuses it
            self._inspector.inspect(described, inputs)
        return self._inner.predict(signature, inputs, deadline_s=deadline_s)
