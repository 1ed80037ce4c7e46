"""The way to the service, or to any TensorFlow Serving, over gRPC: PredictionService and ModelService.

The messages are our own, with TensorFlow Serving's field numbers (protos/prediction.proto): no TensorFlow is needed.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from client.backoff import choose_wait_s
from client.errors import (
    ClientError,
    ConnectionFailed,
    ImageRejected,
    ModelNotFound,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedReply,
)
from client.images import Picture, as_jpeg_or_png
from client.predictions import Failure, ModelStatus, Prediction, ServiceStatus
from client.protos import prediction_pb2
from client.rest import DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, check_model, check_patience, is_this_machine

logger = logging.getLogger(__name__)

MAX_REPLY_BYTES = 64 * 1024 * 1024

# As the exported models have them: encoded pictures to probabilities, and class numbers to names.
PICTURES_SIGNATURE, PICTURES_INPUT = "image_bytes", "image_bytes"
PIXELS_SIGNATURE, PIXELS_INPUT = "serving_default", "images"
LABELS_SIGNATURE, LABELS_INPUT = "labels", "class_id"
OUTPUTS = ("probabilities", "class_id", "label")

DT_FLOAT, DT_UINT8, DT_STRING, DT_INT64 = 1, 4, 7, 9  # tensorflow/core/framework/types.proto
STATES = {10: "START", 20: "LOADING", 30: "AVAILABLE", 40: "UNLOADING", 50: "END"}

_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"

# gRPC gives the same status for a server that says it is busy and for none at all; only its words differ.
_NO_CONNECTION = re.compile("connect|socket|reset by peer|resol|goaway", re.IGNORECASE)


class GrpcTransport:
    """Calls to one model of one server, tried again where that can help. Arguments as for `GrpcClient`."""

    def __init__(
        self,
        address: str,
        *,
        model: str,
        version: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        check_patience(timeout_s, retries)
        host = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^/:\s]+):([0-9]{1,5})", address)
        if not host:
            raise ValueError(f"expected a gRPC address such as 127.0.0.1:8500, got {address!r}")
        if not model:
            raise ValueError("a model has to be named: over gRPC no server tells what it has")
        check_model(model, version)
        self.address = address
        self._model = model
        self._version = version
        self._timeout_s = timeout_s
        self._retries = retries
        self._sleep = sleep
        self._class_names: dict[int, tuple[str, ...]] = {}  # by version
        self._refused_shapes: set[tuple[int, ...]] = set()  # of pixels that the model does not take as they are
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.enable_http_proxy", 0 if is_this_machine(host[1].strip("[]")) else 1),
                ("grpc.keepalive_time_ms", 60_000),
            ],
        )
        self._predict = self._channel.unary_unary(
            _PREDICT,
            request_serializer=prediction_pb2.PredictRequest.SerializeToString,
            response_deserializer=prediction_pb2.PredictResponse.FromString,
        )
        self._get_status = self._channel.unary_unary(
            _STATUS,
            request_serializer=prediction_pb2.GetModelStatusRequest.SerializeToString,
            response_deserializer=prediction_pb2.GetModelStatusResponse.FromString,
        )

    def predict_batch(self, pictures: Sequence[Picture]) -> list[Prediction | Failure]:
        """Classify pictures, in their order; see `Transport`.

        The server refuses a request with an unreadable picture as a whole and does not say which it is, so such a
        request is sent again in halves, until the culprit stands alone.
        """
        outcomes: dict[int, Prediction | Failure] = {}
        sendable = []
        for picture in pictures:
            try:
                sendable.append(as_jpeg_or_png(picture))
            except ImageRejected as error:
                outcomes[picture.index] = Failure(error.index, error.file, error.reason)
        groups = [sendable] if sendable else []
        while groups:
            group = groups.pop()
            try:
                outcomes |= self._predict_group(group)
            except _RefusedError as refusal:
                if len(group) > 1:
                    middle = len(group) // 2
                    groups += [group[middle:], group[:middle]]
                else:
                    outcomes[group[0].index] = Failure(group[0].index, group[0].file, str(refusal))
        return [outcomes[picture.index] for picture in pictures]

    def status(self) -> ServiceStatus:
        """Ask once, without retries, what became of the model; see `Transport`."""
        request = prediction_pb2.GetModelStatusRequest(model_spec=self._spec(self._version))
        try:
            reply = self._get_status(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._error(error) from error
        models = tuple(
            ModelStatus(
                self._model,
                status.version,
                STATES.get(status.state, "UNKNOWN"),
                error=status.status.error_message or None,
            )
            for status in reply.model_version_status
        )
        ready = any(model.state == "AVAILABLE" for model in models)
        return ServiceStatus(ready, None if ready else f"no version of {self._model} is available", models)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _predict_group(self, pictures: Sequence[Picture]) -> dict[int, Prediction]:
        deadline_s = time.monotonic() + self._timeout_s
        reply = self._send_pixels(pictures, deadline_s) or self._send_files(pictures, deadline_s)
        probabilities = self._read_numbers(reply, "probabilities", DT_FLOAT)
        class_ids = self._read_numbers(reply, "class_id", DT_INT64)
        labels = self._read_strings(reply, "label")
        if probabilities.ndim != 2 or not len(probabilities) == len(class_ids) == len(labels) == len(pictures):
            raise UnexpectedReply(
                f"expected probabilities, class_id and label of {len(pictures)} pictures from {self.address}, got "
                f"{probabilities.shape}, {class_ids.shape} and ({len(labels)},)"
            )
        version = reply.model_spec.version.value
        names = self._find_class_names(version, probabilities.shape[1], deadline_s)
        return {
            picture.index: Prediction(
                file=picture.file,
                label=label,
                class_id=int(class_id),
                confidence=float(row.max()),
                probabilities=dict(zip(names, row.tolist(), strict=True)),
                model=self._model,
                model_version=version,
            )
            for picture, row, class_id, label in zip(pictures, probabilities, class_ids, labels, strict=True)
        }

    def _send_files(self, pictures: Sequence[Picture], deadline_s: float) -> Any:
        files = prediction_pb2.Tensor(dtype=DT_STRING, string_val=[picture.data for picture in pictures])
        files.tensor_shape.dim.add(size=len(pictures))
        return self._classify(PICTURES_SIGNATURE, {PICTURES_INPUT: files}, deadline_s)

    def _send_pixels(self, pictures: Sequence[Picture], deadline_s: float) -> Any:
        """Send pixels as they are, where all pictures are pixels of the model's own size; None where they are not."""
        arrays = [picture.pixels for picture in pictures if picture.pixels is not None]
        shapes = {array.shape for array in arrays}
        if len(arrays) < len(pictures) or len(shapes) > 1 or shapes <= self._refused_shapes:
            return None
        pixels = prediction_pb2.Tensor(dtype=DT_UINT8, tensor_content=np.stack(arrays).tobytes())
        for size in (len(arrays), *arrays[0].shape):
            pixels.tensor_shape.dim.add(size=size)
        try:
            return self._classify(PIXELS_SIGNATURE, {PIXELS_INPUT: pixels}, deadline_s)
        except (_RefusedError, RequestRejected):
            self._refused_shapes |= shapes  # the model wants another size: as files it resizes them
            return None

    def _classify(self, signature: str, inputs: dict[str, Any], deadline_s: float) -> Any:
        spec = self._spec(self._version, signature)
        return self._call(
            prediction_pb2.PredictRequest(model_spec=spec, inputs=inputs, output_filter=OUTPUTS), deadline_s
        )

    def _find_class_names(self, version: int, count: int, deadline_s: float) -> tuple[str, ...]:
        """Return the names of a version's classes, asked for once; their numbers where the model does not tell."""
        if version not in self._class_names:
            ids = prediction_pb2.Tensor(dtype=DT_INT64, int64_val=range(count))
            ids.tensor_shape.dim.add(size=count)
            request = prediction_pb2.PredictRequest(
                model_spec=self._spec(version, LABELS_SIGNATURE), inputs={LABELS_INPUT: ids}
            )
            try:
                names = self._read_strings(self._call(request, deadline_s), "label")
            except (_RefusedError, RequestRejected):
                names = []
            if len(set(names)) != count:
                names = [str(class_id) for class_id in range(count)]
            self._class_names[version] = tuple(names)
        names_of_version = self._class_names[version]
        if len(names_of_version) != count:
            raise UnexpectedReply(f"{self.address} gave {count} probabilities for {len(names_of_version)} classes")
        return names_of_version

    def _call(self, request: Any, deadline_s: float) -> Any:
        """Send a request, again while the server cannot be reached or is busy, until retries or time are used up."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._predict(request, timeout=max(0.001, deadline_s - time.monotonic()))
            except grpc.RpcError as error:
                problem = self._error(error)
                if not isinstance(problem, (ConnectionFailed, ServerBusy)):
                    raise problem from error
                wait_s = choose_wait_s(attempt)
                if attempt > self._retries or time.monotonic() + wait_s >= deadline_s:
                    tries = "" if attempt == 1 else f" (tried {attempt} times)"
                    raise type(problem)(f"{problem}{tries}") from error
                logger.info("%s; trying again in %.1f s", problem, wait_s)
                self._sleep(wait_s)

    def _spec(self, version: int | None, signature: str = "") -> Any:
        spec = prediction_pb2.ModelSpec(name=self._model, signature_name=signature)
        if version is not None:
            spec.version.value = version
        return spec

    def _read_numbers(self, reply: Any, name: str, dtype: int) -> np.ndarray[Any, Any]:
        tensor = self._find_tensor(reply, name, dtype)
        numpy_dtype = np.dtype(np.float32 if dtype == DT_FLOAT else np.int64)
        shape = [dimension.size for dimension in tensor.tensor_shape.dim]
        values = (
            np.frombuffer(tensor.tensor_content, numpy_dtype.newbyteorder("<"))
            if tensor.tensor_content and len(tensor.tensor_content) % numpy_dtype.itemsize == 0
            else np.array(tensor.float_val if dtype == DT_FLOAT else tensor.int64_val, numpy_dtype)
        )
        if min(shape, default=0) < 0 or math.prod(shape) != len(values):
            raise UnexpectedReply(f"the output {name} of {self.address} has {len(values)} values for {shape}")
        return values.reshape(shape)

    def _read_strings(self, reply: Any, name: str) -> list[str]:
        tensor = self._find_tensor(reply, name, DT_STRING)
        return [value.decode("utf-8", errors="replace") for value in tensor.string_val]

    def _find_tensor(self, reply: Any, name: str, dtype: int) -> Any:
        if name not in reply.outputs or reply.outputs[name].dtype != dtype:
            raise UnexpectedReply(
                f"expected the output {name} of type {dtype} from {self.address}, got {sorted(reply.outputs)}; "
                f"is {self._model} a picture classifier?"
            )
        return reply.outputs[name]

    def _error(self, error: Any) -> ClientError:
        """Return the error that a call's status stands for."""
        code, details = error.code(), error.details() or "no reason given"
        match code:
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.RESOURCE_EXHAUSTED:
                return _RefusedError(details)
            case grpc.StatusCode.NOT_FOUND:
                return ModelNotFound(f"{self.address} has no such model or version: {details}")
            case grpc.StatusCode.FAILED_PRECONDITION:
                return RequestRejected(
                    f"{self.address} refuses the request: {details}; the model needs the signature "
                    f"{PICTURES_SIGNATURE}, from encoded pictures to {', '.join(OUTPUTS)}"
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return RequestTimedOut(
                    f"no answer from {self.address} within {self._timeout_s:g} s; allow more time with timeout_s "
                    "(--timeout), or send fewer pictures at once with batch_size (--batch-size)"
                )
            case grpc.StatusCode.UNAVAILABLE if _NO_CONNECTION.search(details):
                return ConnectionFailed(
                    f"cannot reach {self.address} ({details}); is it the gRPC port of a running server?"
                )
            case grpc.StatusCode.UNAVAILABLE:
                return ServerBusy(f"{self.address} is not ready: {details}")
            case grpc.StatusCode.UNIMPLEMENTED:
                return UnexpectedReply(f"what listens at {self.address} is not a TensorFlow Serving: {details}")
        return ServerFailed(f"{self.address} failed to answer: {code.name}, {details}")


class _RefusedError(ClientError):
    """The server refuses what is in the request: one of the pictures, or their number."""
