"""A TensorFlow Serving server elsewhere as the place where models answer, over its gRPC API.

The same service stands in front: pages, uploads, limits, metrics and dialects; only the predictor is another.
"""

from __future__ import annotations

import logging
import random
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

from serving.errors import InvalidRequest, ModelFailed, ModelNotFound, ServingError
from serving.grpc.tensors import read_tensor, write_tensor
from serving.model_config import ModelConfig
from serving.predictor import NUMPY_DTYPES, Predictor, Signature, TensorSpec, check_inputs, read_signature_defs
from serving.repository import ModelRepository, ModelVersion, VersionStatus
from serving.waiting import offload

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0  # as long as TensorFlow Serving's REST API lets a request take
LOOK_TIMEOUT_S = 5.0
MAX_REPLY_BYTES = 1024 * 1024 * 1024
ATTEMPTS = 3

LABELS_SIGNATURE = "labels"  # class_id to label, in the models that this project exports


class RemoteRepository(ModelRepository):
    """Hands out the versions that a remote TensorFlow Serving says it has AVAILABLE.

    Args:
        address: the server's gRPC address, "host:port".
        names: the models to ask it for; its API cannot list them.
        wrap_predictor: what requests go through instead of the predictor itself. It is given the model's name.
    """

    def __init__(
        self,
        address: str,
        names: Sequence[str],
        *,
        wrap_predictor: Callable[[str, Predictor], Predictor] = lambda _, predictor: predictor,
    ) -> None:
        super().__init__(names)
        self._address = address
        self._wrap_predictor = wrap_predictor
        self._problems: dict[str, str] = {}
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

    def load(self) -> None:
        """Look for the models once. That the server is away is no reason to end: it may come."""
        self.update()
        self._loaded = True

    def reload(self, configs: Sequence[ModelConfig]) -> None:  # noqa: ARG002
        """As `ModelRepository.reload`: a ModelFailed, for what is served is decided at the server."""
        raise ModelFailed(
            f"this service has no models of its own; send the configuration to {self._address}", code="UNIMPLEMENTED"
        )

    def _look(self) -> None:
        for name in self._names:
            try:
                self._update_model(name)
            except grpc.RpcError as error:
                self._report(name, _message(error, self._address))
                if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
                    self._unload(name, keep=set())
            except InvalidRequest as error:
                self._report(name, f"the reply of {self._address} cannot be used: {error}")
            else:
                self._problems.pop(name, None)

    def _update_model(self, name: str) -> None:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        reply = self._models.GetModelStatus(request, timeout=LOOK_TIMEOUT_S)
        available = set()
        for status in reply.model_version_status:
            state = get_model_status_pb2.ModelVersionStatus.State.Name(status.state)
            if state == "AVAILABLE":
                available.add(status.version)
                if status.version not in self._available.get(name, {}):
                    self._serve_version(name, status.version)
            code = error_codes_pb2.Code.Name(status.status.error_code)
            self._show(VersionStatus(name, status.version, state, code, status.status.error_message))
        self._unload(name, keep=available)

    def _serve_version(self, name: str, version: int) -> None:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = name
        request.model_spec.version.value = version
        reply = self._prediction.GetModelMetadata(request, timeout=LOOK_TIMEOUT_S)
        described = get_model_metadata_pb2.SignatureDefMap()
        if not reply.metadata["signature_def"].Unpack(described):
            raise InvalidRequest("it does not describe the model's signatures")
        signatures = read_signature_defs(described.signature_def)
        predictor = RemotePredictor(self._prediction, name, version, signatures, address=self._address)
        card = _read_class_names(predictor)
        self._serve(ModelVersion(name, version, self._wrap_predictor(name, predictor), card))
        logger.info("%s version %d is available at %s", name, version, self._address)

    def _report(self, name: str, problem: str) -> None:
        if self._problems.get(name) != problem:
            logger.warning("model %s: %s", name, problem)
        self._problems[name] = problem

    def _problem(self, name: str) -> str:
        return self._problems.get(name) or super()._problem(name)


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

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """As `Predictor.predict`; the time that remains until the deadline is the server's too."""
        if signature not in self.signatures:
            raise InvalidRequest(f'Serving signature name: "{signature}" not found in signature def')
        specs = self.signatures[signature].inputs
        check_inputs(self.signatures[signature], inputs)
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self._model
        request.model_spec.version.value = self._version
        request.model_spec.signature_name = signature
        for name, array in inputs.items():
            _write_input(request.inputs[name], array, specs[name])
        reply = offload(self._send, request, deadline_s or time.monotonic() + CALL_TIMEOUT_S)
        return {
            name: read_tensor(tensor, name=name, max_bytes=MAX_REPLY_BYTES) for name, tensor in reply.outputs.items()
        }

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


def _read_class_names(predictor: RemotePredictor) -> dict[str, Any] | None:
    """Ask a model for the labels of its classes, in the place of the card that stays on the server's disk."""
    default = predictor.signatures.get("serving_default")
    lookup = predictor.signatures.get(LABELS_SIGNATURE)
    shape = default.outputs["probabilities"].shape if default and "probabilities" in default.outputs else None
    if not lookup or not shape or shape[-1] is None or lookup.inputs.keys() != {"class_id"}:
        return None
    try:
        outputs = predictor.predict(LABELS_SIGNATURE, {"class_id": np.arange(shape[-1], dtype=np.int64)})
    except ServingError as error:
        logger.warning("the labels of the classes cannot be had, so their numbers are shown: %s", error)
        return None
    return {"class_names": [label.decode("utf-8", errors="replace") for label in outputs["label"]]}


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
    return str(error.details() or code.name)
