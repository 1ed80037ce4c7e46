"""Remote backend: repository and predictor for the models of a TensorFlow Serving server, over its gRPC API."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import error_codes_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from typing_extensions import override

from serving.errors import InvalidBackendResponse, InvalidRequest, ModelFailed, ModelNotFound, NotReady, ServingError
from serving.greenlets import run_blocking
from serving.inference.model_config import ModelConfig
from serving.inference.model_info import ModelInfo, read_label_names
from serving.inference.repository import ModelRepository, ModelVersion, VersionStatus
from serving.inference.saved_model import read_signature_defs
from serving.inference.signatures import NUMPY_DTYPES, Predictor, Signature, TensorSpec, check_inputs
from serving.inference.statistics import CountedPredictor, Statistics
from serving.inference.tensor_proto import read_tensor, write_tensor
from serving.quoting import hide_paths, printable
from serving.request_context import current_request

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0  # the default request timeout of TensorFlow Serving's REST API
POLL_TIMEOUT_S = 5.0
MAX_RESPONSE_BYTES = 1024 * 1024 * 1024
ATTEMPTS = 3

# TensorFlow Serving with batching: "Task size 65 is larger than maximum input batch size 64".
_BATCH_LIMIT = re.compile(r"larger than maximum (?:input )?batch size (\d+)")
_Metadata = tuple[tuple[str, str], ...]  # of a gRPC call

_UNPARSABLE = "Exception deserializing response!"  # gRPC's details for a response that cannot be parsed


class RemoteRepository(ModelRepository):
    """The versions that a remote TensorFlow Serving reports as AVAILABLE.

    Args:
        address: the server's gRPC address, "host:port".
        names: the models to serve; the server's API cannot list its models.
        required: see `ModelRepository`.
        wrap_predictor: wraps the predictor for requests. Its arguments are the model's name and the predictor.
    """

    def __init__(
        self,
        address: str,
        names: Sequence[str],
        *,
        required: Sequence[str] = (),
        wrap_predictor: Callable[[str, Predictor], Predictor] = lambda _, predictor: predictor,
    ) -> None:
        super().__init__(map(printable, names), required=required)
        self._address = address
        self._wrap_predictor = wrap_predictor
        self._problems: dict[str, tuple[type[ServingError], str]] = {}  # error of each model at the last poll
        # One persistent channel: gRPC reconnects it, and keep-alive detects a dead server.
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 2_000),
            ],
        )
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    @override
    def reload(self, configs: Sequence[ModelConfig]) -> None:
        raise ModelFailed(
            f"the models are configured on the remote server; send the configuration to {self._address}",
            code="UNIMPLEMENTED",
        )

    @override
    def load_model(self, name: str) -> None:
        raise self._no_control()

    @override
    def unload_model(self, name: str) -> None:
        raise self._no_control()

    def _no_control(self) -> ModelFailed:
        return ModelFailed(
            f"models are loaded and unloaded by the remote server at {self._address}, not by this one",
            code="UNIMPLEMENTED",
        )

    @override
    def resolve(self, name: str, *, version: int | None = None, label: str | None = None) -> ModelVersion:
        """See `ModelRepository.resolve`. Also raises InvalidBackendResponse; NotReady if the server is unreachable."""
        try:
            return super().resolve(name, version=version, label=label)
        except ModelNotFound:
            self._raise_problem(name)
            raise

    @override
    def versions(self, name: str, number: int | None = None) -> list[VersionStatus]:
        """See `ModelRepository.versions`. Raises the same errors as `resolve`."""
        if name not in self._available:
            self._raise_problem(name)
        return super().versions(name, number)

    @override
    def problem(self, name: str) -> str:
        return self._problems[name][1] if name in self._problems else super().problem(name)

    def _raise_problem(self, name: str) -> None:
        if name in self._problems:
            kind, message = self._problems[name]
            raise kind(message)

    @override
    def _poll(self) -> None:
        for name in self._names:
            try:
                self._update_model(name)
            except grpc.RpcError as error:
                unreachable = error.code() != grpc.StatusCode.NOT_FOUND
                message = _error_message(error, self._address)
                self._report(name, NotReady if unreachable else ModelNotFound, message)
                if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
                    self._unload(name, keep=set())
            except Exception as error:  # an invalid response must not affect other models
                message = f"invalid response from TensorFlow Serving at {self._address}: {error}"
                self._report(name, InvalidBackendResponse, message)
            else:
                self._problems.pop(name, None)

    def _update_model(self, name: str) -> None:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        response = self._models.GetModelStatus(request, timeout=POLL_TIMEOUT_S)
        states = get_model_status_pb2.ModelVersionStatus.State
        statuses = [
            VersionStatus(
                name,
                status.version,
                states.Name(status.state),
                error_codes_pb2.Code.Name(status.status.error_code),
                status.status.error_message,
            )
            for status in response.model_version_status
        ]
        available = {status.version for status in statuses if status.state == "AVAILABLE"}
        for version in available - self._available.get(name, {}).keys():
            self._serve_version(name, version)
        for status in statuses:
            self._set_status(status)
        self._unload(name, keep=available)

    def _serve_version(self, name: str, version: int) -> None:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = name
        request.model_spec.version.value = version
        response = self._prediction.GetModelMetadata(request, timeout=POLL_TIMEOUT_S)
        described = get_model_metadata_pb2.SignatureDefMap()
        if not response.metadata["signature_def"].Unpack(described):
            raise ValueError("expected a SignatureDefMap as metadata")
        signatures = read_signature_defs(described.signature_def)
        predictor = RemotePredictor(self._prediction, name, version, signatures, address=self._address)
        info = ModelInfo(read_label_names(predictor))  # model.json stays on the server's disk
        statistics = Statistics()
        wrapped = self._wrap_predictor(name, CountedPredictor(predictor, statistics))
        self._serve(ModelVersion(name, version, wrapped, info, statistics))
        logger.info("%s version %d is available at %s", name, version, self._address)

    def _report(self, name: str, kind: type[ServingError], message: str) -> None:
        problem = kind, hide_paths(printable(message))
        if self._problems.get(name) != problem:
            logger.warning("model %s: %s", name, printable(message))
        self._problems[name] = problem


class RemotePredictor:
    """Predictor for one model version on a remote TensorFlow Serving; `stub` is its PredictionService."""

    def __init__(
        self, stub: Any, model: str, version: int, signatures: Mapping[str, Signature], *, address: str
    ) -> None:
        self.signatures = signatures
        self._stub = stub
        self._model = model
        self._version = version
        self._address = address
        self._max_rows: float = math.inf  # the server's maximum batch size, once it has reported it

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
            except InvalidRequest as error:
                limit = _BATCH_LIMIT.search(str(error))
                if limit is None or not 0 < int(limit[1]) < rows:
                    raise
                self._max_rows = int(limit[1])
                logger.info("model %s has a maximum batch size of %d", self._model, self._max_rows)
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
        """Send a request; retry with exponential backoff if the server is unavailable (predict is idempotent)."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._stub.Predict(request, timeout=max(0.001, deadline_s - time.monotonic()), metadata=metadata)
            except grpc.RpcError as error:
                wait_s = 0.05 * 2**attempt * random.uniform(0.5, 1.0)
                lost = error.code() == grpc.StatusCode.UNAVAILABLE
                if not lost or attempt == ATTEMPTS or time.monotonic() + wait_s >= deadline_s:
                    raise _to_serving_error(error, self._address) from error
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


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
    message = _error_message(error, address)
    if error.code() == grpc.StatusCode.INTERNAL and error.details() == _UNPARSABLE:
        return InvalidBackendResponse(f"the response of TensorFlow Serving at {address} cannot be parsed")
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(message)
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFound(message)
    return ModelFailed(message, code=error.code().name)


def _error_message(error: Any, address: str) -> str:
    code = error.code()
    if code == grpc.StatusCode.UNAVAILABLE:
        return f"TensorFlow Serving at {address} cannot be reached: {error.details()}"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"TensorFlow Serving at {address} did not respond before the deadline"
    return hide_paths(str(error.details() or code.name))
