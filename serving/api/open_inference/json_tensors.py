"""Converts tensors of the Open Inference Protocol from JSON to arrays and back: the protocol's "Tensor Data"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from serving.api.json_arrays import flatten
from serving.errors import InvalidRequest
from serving.inference.signatures import TensorSpec
from serving.open_inference.tensors import MAX_DIMENSIONS, WHOLE, Datatype, datatype_of, out_of_range, refusal, reshape
from serving.quoting import quote


def decode_json(data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Convert JSON data, a flat list or one nested like the shape, to an array of the input's dtype.

    A float without a fraction (106.0) is accepted as an integer, because some clients send all numbers as floats.

    Raises:
        InvalidRequest: the data is not such a list, does not fit the shape, or has an element of the wrong type or out
            of range. Nothing is rounded, wrapped or turned into infinity.
    """
    datatype = datatype_of(spec)
    if not datatype.json_types:
        raise refusal(spec, f"{datatype.name} cannot be sent as JSON; send it as binary data")
    if type(data) is not list:
        raise refusal(spec, f"data must be a list, not {quote(data)}")
    flat = flatten(data)
    if flat is None:
        raise refusal(spec, "lists at one level of data differ in length")
    elements, sizes, types = flat
    if float in types and datatype.json_types == WHOLE:
        elements = [int(n) if type(n) is float and n.is_integer() else n for n in elements]
        types = set(map(type, elements))
    if not types <= datatype.json_types:
        odd = next(element for element in elements if type(element) not in datatype.json_types)
        raise refusal(spec, f"{datatype.name} takes {datatype.json_description}, not {quote(odd)}")
    if sizes != shape and sizes != (math.prod(shape),):
        raise refusal(
            spec,
            f"the shape {list(shape)} takes {math.prod(shape)} elements, flat or nested like it; "
            f"data has {len(elements)}, nested like {list(sizes[:MAX_DIMENSIONS])}",
        )
    return reshape(_array_of(elements, datatype, spec), spec, shape)


def encode_json(array: np.ndarray, name: str) -> Any:
    """Return an output's elements as a flat list or one-dimensional array; raises InvalidRequest if JSON cannot."""
    flat, odd = array.ravel(), "NaN or infinity"
    if array.dtype.hasobject:
        try:
            return [element.decode() for element in flat]
        except UnicodeDecodeError:
            odd = "bytes that are not UTF-8"
    elif array.dtype.kind != "f" or np.isfinite(flat).all():
        return flat
    raise InvalidRequest(f"output {name} has {odd}, which JSON cannot hold; request it as binary data")


def _array_of(elements: list[Any], datatype: Datatype, spec: TensorSpec) -> np.ndarray:
    if datatype.name == "BYTES":
        return np.array([element.encode() for element in elements], object)
    try:
        if datatype.name == "UINT8":
            return np.frombuffer(bytes(elements), np.uint8)  # pixels; several times faster than np.array of a list
        with np.errstate(over="ignore"):
            array = np.array(elements, datatype.dtype)
    except (OverflowError, ValueError) as error:
        limits = np.iinfo(datatype.dtype)
        odd = next(element for element in elements if not limits.min <= element <= limits.max)
        raise out_of_range(odd, spec) from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        odd = elements[int(np.argmin(np.isfinite(array)))]
        raise refusal(spec, f"{odd} is beyond the range of {datatype.name}")
    return array
