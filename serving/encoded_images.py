"""Encoded images in string tensors: checked before TensorFlow, here or elsewhere, decodes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from serving.decode_cost import QUICK_S, decode_cost, decode_seconds
from serving.errors import InvalidRequest, TooLarge
from serving.image_formats.header import ImageHeader
from serving.image_header import ImageLimits, check_image, read_header
from serving.predictor import Predictor, Signature
from serving.request_context import current_request
from serving.waiting import run_sized

# A session without inter-op threads runs `tf.map_fn` in one thread, but begins an image before it is through with the
# one before. Up to 20 images at once, of every kind measured, took less than 3 times the memory of one.
IMAGES_AT_ONCE = 3

# Less is not reserved: only as many small images as there are calls of the model are decoded at a time.
UNCOUNTED_BYTES = 2 * 1024 * 1024

MAX_QUICK_FILES = 128  # small as each may be; as many are a batch
_ELEMENT_BYTES = 512  # to look at a file's header takes as long as to parse so many bytes


def check_encoded_images(arrays: Iterable[np.ndarray], limits: ImageLimits) -> int:
    """Check every element of string tensors that begins as an image file does.

    Args:
        arrays: the string inputs of one call, object arrays of bytes.
        limits: the service's limits.

    Returns:
        An upper estimate of the memory, in bytes, that the call takes to decode them; 0 where there are no images.

    Raises:
        TooLarge: an image has too many pixels or frames, or a side that is too long.
        InvalidRequest: an image has too many scans, or parts that no image needs.
    """
    cost = 0
    for array in arrays:
        costs: list[int] = []
        for image in _find_images(array):
            try:
                check_image(image.header, limits, decoder="tensorflow")
            except (InvalidRequest, TooLarge) as error:
                raise type(error)(f"image {image.index}: {error}") from error
            # The file itself is copied into the tensor, however many are decoded at once.
            cost += image.header.file_bytes * image.count
            one = decode_cost(image.header, decoder="tensorflow") - image.header.file_bytes
            costs += [one] * min(image.count, IMAGES_AT_ONCE)
        cost += sum(sorted(costs)[-IMAGES_AT_ONCE:])
    return cost


def decodes_slowly(signature: Signature, inputs: Mapping[str, np.ndarray]) -> bool:
    """Whether the images in the string inputs of a call take longer to decode than others should wait for."""
    arrays = [inputs[name] for name, spec in signature.inputs.items() if spec.dtype == "DT_STRING"]
    if sum(array.size for array in arrays) > MAX_QUICK_FILES:
        return True
    return decode_seconds_of(arrays) > QUICK_S


def decode_seconds_of(arrays: Iterable[np.ndarray]) -> float:
    """Estimate how long one core takes to decode the images in string tensors."""
    return sum(decode_seconds(image.header) * image.count for array in arrays for image in _find_images(array))


@dataclass(frozen=True, slots=True)
class _Image:
    index: int  # of the first element that is this image
    count: int  # of elements that are the same object
    header: ImageHeader


def _find_images(array: np.ndarray) -> Iterator[_Image]:
    """Find the elements that begin as image files do.

    A tensor may hold the same object a million times: where a message gives fewer values than elements, the last one
    is repeated.
    """
    if array.dtype != np.object_:
        return  # not a string tensor: `check_inputs` refuses it
    elements = array.ravel().tolist()
    counts = Counter(map(id, elements))
    for index, data in enumerate(elements):
        if (count := counts.pop(id(data), 0)) and isinstance(data, bytes) and (header := read_header(data)):
            yield _Image(index, count, header)


class ImageLimitsPredictor:
    """A predictor that refuses oversized encoded images before another one sees them.

    Inputs that are not strings cost nothing here.

    Args:
        inner: the predictor.
        limits: the service's limits.
    """

    def __init__(self, inner: Predictor, limits: ImageLimits) -> None:
        self._inner = inner
        self._limits = limits
        self.signatures: Mapping[str, Signature] = inner.signatures
        self._string_inputs = {
            name: strings
            for name, signature in inner.signatures.items()
            if (strings := tuple(key for key, spec in signature.inputs.items() if spec.dtype == "DT_STRING"))
        }

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`; also TooLarge where an image exceeds the limits."""
        if strings := self._string_inputs.get(signature):
            arrays = [inputs[name] for name in strings if name in inputs]
            size = sum(array.size for array in arrays) * _ELEMENT_BYTES
            cost = run_sized(size, check_encoded_images, arrays, self._limits)
            if cost > UNCOUNTED_BYTES:
                current_request.get().reserve(cost)
        return self._inner.predict(signature, inputs, deadline_s=deadline_s)
