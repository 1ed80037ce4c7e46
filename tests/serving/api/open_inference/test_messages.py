from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import orjson
import pytest

from serving.api.json_arrays import SLICE_ELEMENTS
from serving.api.open_inference.messages import render
from serving.inference.repository import ModelVersion
from serving.inference.service import InferenceResult
from serving.inference.signatures import Signature, TensorSpec
from serving.open_inference.requests import InferRequest, RequestedOutput

LARGE = np.arange(3 * SLICE_ELEMENTS, dtype=np.float32).reshape(2, -1) / 8


def test_large_outputs_are_written_like_small_ones_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"a": LARGE, "b": np.array([b"x\0"], object), "c": LARGE[::-1], "d": LARGE}
    specs = {
        name: TensorSpec(name, "DT_STRING" if array.dtype.hasobject else "DT_FLOAT", None, f"{name}:0")
        for name, array in outputs.items()
    }
    version = ModelVersion("m", 1, mock.Mock())
    result = InferenceResult(version, Signature("any", "", {}, specs), outputs)
    expected = {
        "model_name": "m",
        "model_version": "1",
        "id": "\0",
        "outputs": [
            {"name": "a", "datatype": "FP32", "shape": LARGE.shape, "data": LARGE.ravel()},
            {"name": "b", "datatype": "BYTES", "shape": (1,), "data": ["x\0"]},
            {"name": "c", "datatype": "FP32", "shape": LARGE.shape, "data": LARGE[::-1].ravel()},
            {"name": "d", "datatype": "FP32", "shape": LARGE.shape, "parameters": {"binary_data_size": LARGE.nbytes}},
        ],
    }
    text = orjson.dumps(expected, option=orjson.OPT_SERIALIZE_NUMPY)
    sizes = []

    def dumps(*args: Any, **kwargs: Any) -> bytes:
        sizes.append(len(written := original(*args, **kwargs)))
        return written

    original = orjson.dumps
    monkeypatch.setattr(orjson, "dumps", dumps)
    request = InferRequest("any", {}, "\0", {name: RequestedOutput(is_binary=name == "d") for name in outputs})
    body, json_bytes = render(request, result)
    assert (body, json_bytes) == (text + LARGE.tobytes(), len(text))
    assert max(sizes) < len(text) / 4
