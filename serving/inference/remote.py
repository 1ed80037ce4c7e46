"""A TensorFlow Serving server elsewhere as the place where models answer, over its gRPC API.

The same service stands in front: pages, uploads, limits, metrics and dialects; only the predictor is another.
"""

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

from serving.errors import InvalidBackendResponse, InvalidRequest, ModelFailed, ModelNotFound, NotReady, ServingError
from serving.greenlets import run_blocking
from serving.inference.model_config import ModelConfig
from serving.inference.model_info import ModelInfo, read_label_names
from serving.inference.path_hiding import hide_paths
from serving.inference.repository import ModelRepository, ModelVersion, VersionStatus
from serving.inference.saved_model import read_signature_defs
from serving.inference.signatures import NUMPY_DTYPES, Predictor, Signature, TensorSpec, check_inputs
from serving.inference.tensor_proto import read_tensor, write_tensor
from serving.quoting import printable

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0  # as long as TensorFlow Serving's REST API lets a request take
LOOK_TIMEOUT_S = 5.0
MAX_REPLY_BYTES = 1024 * 1024 * 1024
ATTEMPTS = 3

# "Task size 65 is larger than maximum input batch size 64": what a server with batching says of too many rows.
_BATCH_LIMIT = re.compile(r"larger than maximum (?:input )?batch size (\d+)")
_UNREADABLE = "Exception deserializing response!"  # gRPC's details where a response is not a message of its type


class RemoteRepository(ModelRepository):
    """Hands out the versions that a remote TensorFlow Serving says it has AVAILABLE.

    Args:
        address: the server's gRPC address, "host:port".
        names: the models to ask it for; its API cannot list them.
        required: the models without which the repository is not ready.
        wrap_predictor: what requests go through instead of the predictor itself. It is given the model's name.
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
        self._problems: dict[
            str, tuple[type[ServingError], str]
        ] = {}  # why a model could not be asked for at the last poll
        # One channel, kept: gRPC reconnects it by itself, and keep-alive notices a server that is gone.
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 2_000),
            ],
        )
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def reload(self, configs: Sequence[ModelConfig]) -> None:  # noqa: ARG002
        """As `ModelRepository.reload`: a ModelFailed, for what is served is decided at the server."""
        raise ModelFailed(
            f"this service has no models of its own; send the configuration to {self._address}", code="UNIMPLEMENTED"
        )

    def resolve(self, name: str, *, version: int | None = None, label: str | None = None) -> ModelVersion:
        """As `ModelRepository.resolve`.

        Raises:
            NotReady: the server cannot be reached.
            InvalidBackendResponse: its description of the model cannot be used.
        """
        try:
            return super().resolve(name, version=version, label=label)
        except ModelNotFound:
            self._raise_problem(name)
            raise

    def versions(self, name: str, number: int | None = None) -> list[VersionStatus]:
        """As `ModelRepository.versions`; raises as `resolve` does where the server's state is not known."""
        if name not in self._available:
            self._raise_problem(name)
        return super().versions(name, number)

    def problem(self, name: str) -> str:
        """As `ModelRepository.problem`."""
        return self._problems[name][1] if name in self._problems else super().problem(name)

    def _raise_problem(self, name: str) -> None:
        if (problem := self._problems.get(name)) is not None:
            kind, message = problem
            raise kind(message)

    def _look(self) -> None:
        for name in self._names:
            try:
                self._update_model(name)
            except grpc.RpcError as error:
                unreachable = error.code() != grpc.StatusCode.NOT_FOUND
                message = _message(error, self._address)
                self._report(name, NotReady if unreachable else ModelNotFound, message)
                if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
                    self._unload(name, keep=set())
            except Exception as error:  # whatever it sent: other models are asked for all the same
                message = f"the response of TensorFlow Serving at {self._address} cannot be used: {error}"
                self._report(name, InvalidBackendResponse, message)
            else:
                self._problems.pop(name, None)

    def _update_model(self, name: str) -> None:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        reply = self._models.GetModelStatus(request, timeout=LOOK_TIMEOUT_S)
        states = get_model_status_pb2.ModelVersionStatus.State
        statuses = [
            VersionStatus(
                name,
                status.version,
                states.Name(status.state),
                error_codes_pb2.Code.Name(status.status.error_code),
                status.status.error_message,
            )
            for status in reply.model_version_status
        ]
        available = {status.version for status in statuses if status.state == "AVAILABLE"}
        for version in available - self._available.get(name, {}).keys():
            self._serve_version(name, version)
        for status in statuses:
            self._show(status)
        self._unload(name, keep=available)

    def _serve_version(self, name: str, version: int) -> None:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = name
        request.model_spec.version.value = version
        reply = self._prediction.GetModelMetadata(request, timeout=LOOK_TIMEOUT_S)
        described = get_model_metadata_pb2.SignatureDefMap()
        if not reply.metadata["signature_def"].Unpack(described):
            raise ValueError("it does not describe the model's signatures")
        signatures = read_signature_defs(described.signature_def)
        predictor = RemotePredictor(self._prediction, name, version, signatures, address=self._address)
        info = ModelInfo(read_label_names(predictor))  # model.json stays on the server's disk
        self._serve(ModelVersion(name, version, self._wrap_predictor(name, predictor), info))
        logger.info("%s version %d is available at %s", name, version, self._address)

    def _report(self, name: str, kind: type[ServingError], message: str) -> None:
        problem = kind, hide_paths(printable(message))
        if self._problems.get(name) != problem:
            logger.warning("model %s: %s", name, printable(message))
        self._problems[name] = problem


class RemotePredictor:
    """One version of a model at a remote TensorFlow Serving.

    Args:
        stub: of its PredictionService.
        model: the model's name.
        version: the version asked for in every request.
        signatures: the model's.
        address: of the server, for messages.
    """

    def __init__(
        self, stub: Any, model: str, version: int, signatures: Mapping[str, Signature], *, address: str
    ) -> None:
        self.signatures = signatures
        self._stub = stub
        self._model = model
        self._version = version
        self._address = address
        self._max_rows: float = math.inf  # of one request, as far as the server has said

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """As `Predictor.predict`; the time that remains until the deadline is the server's too."""
        if signature not in self.signatures:
            raise InvalidRequest(f'Serving signature name: "{signature}" not found in signature def')
        described = self.signatures[signature]
        check_inputs(described, inputs)
        deadline_s = deadline_s or time.monotonic() + CALL_TIMEOUT_S
        return run_blocking(self._predict_rows, described, inputs, deadline_s)

    def _predict_rows(
        self, signature: Signature, inputs: Mapping[str, np.ndarray], deadline_s: float
    ) -> dict[str, np.ndarray]:
        """Send a request, in parts where the server takes fewer rows at a time."""
        rows = _batch_rows(signature, inputs) or 1
        if rows <= self._max_rows:
            try:
                return self._predict_once(signature, inputs, deadline_s)
            except InvalidRequest as error:
                limit = _BATCH_LIMIT.search(str(error))
                if limit is None or not 0 < int(limit[1]) < rows:
                    raise
                self._max_rows = int(limit[1])
                logger.info("model %s takes at most %d rows at a time", self._model, self._max_rows)
        size = int(self._max_rows)
        parts = [
            self._predict_rows(
                signature, {name: array[start : start + size] for name, array in inputs.items()}, deadline_s
            )
            for start in range(0, rows, size)
        ]
        if any(array.ndim == 0 for part in parts for array in part.values()):
            raise InvalidRequest(
                f"TensorFlow Serving at {self._address} takes at most {size} rows at a time, and the outputs of "
                f'signature "{signature.name}" cannot be joined; send fewer'
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _predict_once(
        self, signature: Signature, inputs: Mapping[str, np.ndarray], deadline_s: float
    ) -> dict[str, np.ndarray]:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self._model
        request.model_spec.version.value = self._version
        request.model_spec.signature_name = signature.name
        for name, array in inputs.items():
            _write_input(request.inputs[name], array, signature.inputs[name])
        reply = self._send(request, deadline_s)
        rows = _batch_rows(signature, inputs)
        return {name: self._read_output(reply.outputs, spec, rows=rows) for name, spec in signature.outputs.items()}

    def _read_output(self, outputs: Mapping[str, Any], spec: TensorSpec, *, rows: int | None) -> np.ndarray:
        """Return an output as the signature describes it, with as many rows as the inputs have."""
        problem = f"the response of TensorFlow Serving at {self._address} cannot be used: output {spec.name}"
        if spec.name not in outputs:
            raise InvalidBackendResponse(f"{problem} is missing")
        try:
            array = read_tensor(outputs[spec.name], name=spec.name, max_bytes=MAX_REPLY_BYTES)
        except (ServingError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise InvalidBackendResponse(f"{problem}: {error}") from error
        rows = rows if spec.is_batched else None
        if not spec.fits(array) or (rows is not None and len(array) != rows):
            expected = f"{spec}" if rows is None else f"{spec} of {rows} rows"
            raise InvalidBackendResponse(f"{problem}: expected {expected}, got {array.dtype} {array.shape}")
        return array

    def _send(self, request: Any, deadline_s: float) -> Any:
        """Send a request, again if it was not taken: predicting changes nothing, so that is safe."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._stub.Predict(request, timeout=max(0.001, deadline_s - time.monotonic()))
            except grpc.RpcError as error:
                wait_s = 0.05 * 2**attempt * random.uniform(0.5, 1.0)
                lost = error.code() == grpc.StatusCode.UNAVAILABLE
                if not lost or attempt == ATTEMPTS or time.monotonic() + wait_s >= deadline_s:
                    raise _answer_for(error, self._address) from error
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def _batch_rows(signature: Signature, inputs: Mapping[str, np.ndarray]) -> int | None:
    """Return the number of rows of a request; None where not all inputs have a batch axis."""
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


def _answer_for(error: Any, address: str) -> ServingError:
    message = _message(error, address)
    if error.code() == grpc.StatusCode.INTERNAL and error.details() == _UNREADABLE:
        return InvalidBackendResponse(f"the response of TensorFlow Serving at {address} cannot be parsed")
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(message)
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFound(message)
    return ModelFailed(message, code=error.code().name)


def _message(error: Any, address: str) -> str:
    code = error.code()
    if code == grpc.StatusCode.UNAVAILABLE:
        return f"TensorFlow Serving at {address} cannot be reached: {error.details()}"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"TensorFlow Serving at {address} did not answer in time"
    return hide_paths(str(error.details() or code.name))
