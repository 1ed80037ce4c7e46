"""Predictor for one model version on remote servers with TensorFlow Serving's gRPC API."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import predict_pb2

from serving.errors import (
    InvalidBackendResponse,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    ServingError,
    VersionUnloaded,
)
from serving.greenlets import run_blocking
from serving.inference.remote_channels import MAX_RESPONSE_BYTES, Stubs
from serving.inference.signatures import NUMPY_DTYPES, Signature, TensorSpec, check_inputs
from serving.inference.tensor_proto import read_tensor, write_tensor
from serving.quoting import hide_paths
from serving.request_context import current_request

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0  # the default request timeout of TensorFlow Serving's REST API
MOVES = 3  # tries of a request whose backends no longer have the version, while others have it

# TensorFlow Serving with batching: "Task size 65 is larger than maximum input batch size 64". This service with
# --max-rows: "the request has 65 rows; at most 64 are allowed".
_BATCH_LIMIT = re.compile(r"larger than maximum (?:input )?batch size (\d+)|rows; at most ([\d,]+) are allowed")
_Metadata = tuple[tuple[str, str], ...]  # of a gRPC call
# Polls the version again after a `time.monotonic()` timestamp, until a second one: whether it is still served.
_Refresh = Callable[[float, float], bool]

_UNPARSABLE = "Exception deserializing response!"  # gRPC's details for a response that cannot be parsed


class RemotePredictor:
    """Predictor for one model version on remote servers. Every request names the version, so all its parts get it.

    The attribute `refresh` polls the version again, and sets `stubs`; see `RemoteRepository.refresh`.

    Args:
        stubs: the servers that have the version. The poll replaces the attribute when others have it.
        model: name of the model.
        version: number of the version.
        signatures: the version's signatures.
        address: of the servers, for error messages.
    """

    def __init__(
        self,
        stubs: Stubs,
        model: str,
        version: int,
        signatures: Mapping[str, Signature],
        *,
        address: str,
    ) -> None:
        self.stubs = stubs
        self.signatures = signatures
        self._model = model
        self._version = version
        self._address = address
        self.refresh: _Refresh = lambda *_: False
        self._max_rows: float = math.inf  # the servers' maximum batch size, once one has reported it

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`. The remaining time until the deadline is sent to the server."""
        if signature not in self.signatures:
            raise InvalidRequest(f'Serving signature name: "{signature}" not found in signature def')
        described = self.signatures[signature]
        check_inputs(described, inputs)
        deadline_s = deadline_s or time.monotonic() + CALL_TIMEOUT_S
        started_s = time.perf_counter()
        context = current_request.get()
        try:
            return run_blocking(self._predict_rows, described, inputs, deadline_s, context.remote_metadata)
        finally:
            context.model_s += time.perf_counter() - started_s

    def _predict_rows(
        self, signature: Signature, inputs: Mapping[str, np.ndarray], deadline_s: float, metadata: _Metadata
    ) -> dict[str, np.ndarray]:
        """Send a request, split into parts if it exceeds the server's maximum batch size."""
        rows = _batch_rows(signature, inputs) or 1
        if rows <= self._max_rows:
            try:
                return self._predict_once(signature, inputs, deadline_s, metadata)
            except (InvalidRequest, ModelFailed) as error:
                limit = _read_batch_limit(error)
                if not 0 < limit < rows:
                    raise
                self._max_rows = limit
                logger.info("model %s has a maximum batch size of %d", self._model, limit)
        size = int(self._max_rows)
        parts = [
            self._predict_rows(
                signature, {name: array[start : start + size] for name, array in inputs.items()}, deadline_s, metadata
            )
            for start in range(0, rows, size)
        ]
        if any(array.ndim == 0 for part in parts for array in part.values()):
            raise InvalidRequest(
                f"TensorFlow Serving at {self._address} has a maximum batch size of {size}, and the outputs of "
                f'signature "{signature.name}" cannot be concatenated; send at most {size} rows'
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _predict_once(
        self, signature: Signature, inputs: Mapping[str, np.ndarray], deadline_s: float, metadata: _Metadata
    ) -> dict[str, np.ndarray]:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self._model
        request.model_spec.version.value = self._version
        request.model_spec.signature_name = signature.name
        for name, array in inputs.items():
            _write_input(request.inputs[name], array, signature.inputs[name])
        response = self._send(request, deadline_s, metadata)
        rows = _batch_rows(signature, inputs)
        return {name: self._read_output(response.outputs, spec, rows=rows) for name, spec in signature.outputs.items()}

    def _read_output(self, outputs: Mapping[str, Any], spec: TensorSpec, *, rows: int | None) -> np.ndarray:
        """Read an output and check it against the signature and the number of input rows."""
        problem = f"invalid response from TensorFlow Serving at {self._address}: output {spec.name}"
        if spec.name not in outputs:
            raise InvalidBackendResponse(f"{problem} is missing")
        try:
            array = read_tensor(outputs[spec.name], name=spec.name, max_bytes=MAX_RESPONSE_BYTES)
        except (ServingError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise InvalidBackendResponse(f"{problem}: {error}") from error
        rows = rows if spec.is_batched else None
        if not spec.fits(array) or (rows is not None and len(array) != rows):
            expected = f"{spec}" if rows is None else f"{spec} of {rows} rows"
            raise InvalidBackendResponse(f"{problem}: expected {expected}, got {array.dtype} {array.shape}")
        return array

    def _send(self, request: Any, deadline_s: float, metadata: _Metadata) -> Any:
        """Send a request to one of the servers that have the version; gRPC retries it where a server is lost.

        A server that has unloaded the version since the last poll responds NOT_FOUND; then another one is tried.
        """
        for _ in range(MOVES):
            stubs = self.stubs
            timeout_s = max(0.001, deadline_s - time.monotonic())
            try:
                return stubs.prediction.Predict(request, timeout=timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                is_unloaded = error.code() == grpc.StatusCode.NOT_FOUND
                if is_unloaded and not self.refresh(time.monotonic(), deadline_s):
                    raise VersionUnloaded(error_message(error, self._address)) from error
                if not is_unloaded or self.stubs is stubs:
                    raise _to_serving_error(error, self._address) from error
        raise VersionUnloaded(f"version {self._version} of model {self._model} is being unloaded")


def _read_batch_limit(error: ServingError) -> int:
    """Return the maximum batch size that a server's refusal names, or 0."""
    match = _BATCH_LIMIT.search(str(error))
    return int((match[1] or match[2]).replace(",", "")) if match else 0


def _batch_rows(signature: Signature, inputs: Mapping[str, np.ndarray]) -> int | None:
    """Return the number of rows of a request, or None if an input has no batch axis."""
    if not inputs or not all(spec.is_batched for spec in signature.inputs.values()):
        return None
    return len(next(iter(inputs.values())))


def _write_input(tensor: Any, array: np.ndarray, spec: TensorSpec) -> None:
    dtype = NUMPY_DTYPES[spec.dtype]
    if spec.dtype == "DT_STRING":
        write_tensor(tensor, array, dtype_name=spec.dtype)
        return
    tensor.dtype = types_pb2.DataType.Value(spec.dtype)
    for size in array.shape:
        tensor.tensor_shape.dim.add().size = size
    tensor.tensor_content = np.ascontiguousarray(array, dtype.newbyteorder("<")).tobytes()


def _to_serving_error(error: Any, address: str) -> ServingError:
    message = error_message(error, address)
    if error.code() == grpc.StatusCode.INTERNAL and error.details() == _UNPARSABLE:
        return InvalidBackendResponse(f"the response of TensorFlow Serving at {address} cannot be parsed")
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(message)
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFound(message)
    return ModelFailed(message, code=error.code().name)


def error_message(error: Any, address: str) -> str:
    """Return what a failed call means to a client, without paths of the server."""
    code = error.code()
    if code == grpc.StatusCode.UNAVAILABLE:
        return f"TensorFlow Serving at {address} cannot be reached: {error.details()}"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"TensorFlow Serving at {address} did not respond before the deadline"
    return hide_paths(str(error.details() or code.name))
