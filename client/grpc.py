"""gRPC transport: PredictionService and ModelService of the service, or of any TensorFlow Serving.

The messages have TensorFlow Serving's field numbers (protos/prediction.proto), so TensorFlow is not needed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np

from client.batches import Batch, halve, separate
from client.errors import ConnectionFailed, RequestRejected, ServerBusy, UnexpectedResponse
from client.grpc_errors import InvalidArgumentError, make_error, read_retry_after
from client.images import LoadedImage, as_jpeg_or_png
from client.options import DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, choose_retry_wait_s, is_local_host, validate_options
from client.predictions import Failure, ModelStatus, Prediction, ServiceStatus
from client.protos import prediction_pb2
from client.tensors import DT_FLOAT, DT_INT64, DT_STRING, DT_UINT8, make_tensor, read_numbers, read_strings

MAX_RESPONSE_BYTES = 64 * 1024 * 1024

# The signatures of exported models: from encoded images or pixels to probabilities, and from class numbers to names.
FILES_SIGNATURE, FILES_INPUT = "image_bytes", "image_bytes"
PIXELS_SIGNATURE, PIXELS_INPUT = "serving_default", "images"
LABELS_SIGNATURE, LABELS_INPUT = "labels", "class_id"

# Of a version (tensorflow_serving/apis/get_model_status.proto).
STATES = {10: "START", 20: "LOADING", 30: "AVAILABLE", 40: "UNLOADING", 50: "END"}

_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"


class GrpcTransport:
    """Sends batches to one model of one server, and retries. For the arguments, see `GrpcClient`."""

    def __init__(
        self,
        target: str | None,
        *,
        model: str,
        version: int | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        channel: grpc.Channel | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not model:
            raise ValueError("a model name is required: the gRPC API cannot list the models of a server")
        validate_options(model=model, version=version, timeout_s=timeout_s, retries=retries)
        self._owns_channel = channel is None
        self._channel = _open_channel(target, credentials) if channel is None else channel
        self._target = target or "the server of the given channel"  # for messages
        self._metadata = tuple(metadata)
        self._model = model
        self._version = version
        self._timeout_s = timeout_s
        self._retries = retries
        self._sleep = sleep
        self._class_names: dict[int, tuple[str, ...]] = {}  # by version
        self._rejected_shapes: set[tuple[int, ...]] = set()  # of pixels whose size is not the model's
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

    def predict_batch(self, batch: Batch) -> list[Prediction | Failure]:
        """Return an outcome for each item of a batch; failures are returned as they are.

        The server rejects a request with an unreadable image as a whole and does not say which one it is, so the
        request is sent again in halves until the unreadable image is alone.
        """
        images, outcomes = separate(map(as_jpeg_or_png, batch))
        groups = [images]
        while groups:
            if not (group := groups.pop()):
                continue
            try:
                outcomes |= self._predict_group(group)
            except InvalidArgumentError as error:
                if len(group) > 1:
                    groups += halve(group)
                else:
                    outcomes[group[0].index] = Failure(group[0].index, group[0].file, str(error))
        return [outcomes[item.index] for item in batch]

    def status(self) -> ServiceStatus:
        """Return the status of the model, without retries."""
        request = prediction_pb2.GetModelStatusRequest(model_spec=self._make_spec(self._version))
        try:
            response = self._get_status(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise make_error(error, target=self._target, timeout_s=self._timeout_s) from error
        models = tuple(
            ModelStatus(self._model, each.version, STATES.get(each.state, "UNKNOWN"), each.status.error_message or None)
            for each in response.model_version_status
        )
        ready = any(model.state == "AVAILABLE" for model in models)
        return ServiceStatus(ready, None if ready else f"no version of {self._model} is available", models)

    def close(self) -> None:
        """Close the connection, unless the channel was given."""
        if self._owns_channel:
            self._channel.close()

    def _predict_group(self, images: Sequence[LoadedImage]) -> dict[int, Prediction]:
        deadline_s = time.monotonic() + self._timeout_s
        response = self._send_pixels(images, deadline_s) or self._send_files(images, deadline_s)
        probabilities = self._read_numbers(response, "probabilities", DT_FLOAT)
        if probabilities.ndim != 2 or len(probabilities) != len(images):
            raise UnexpectedResponse(
                f"expected probabilities of {len(images)} images from {self._target}, got the shape "
                f"{probabilities.shape}"
            )
        version = response.model_spec.version.value
        names = self._find_class_names(version, probabilities.shape[1], deadline_s)
        class_ids, labels = self._read_classes(response, probabilities, names)
        predictions = {}
        for image, label, class_id, row in zip(images, labels, class_ids.tolist(), probabilities, strict=True):
            by_label, confidence = dict(zip(names, row.tolist(), strict=True)), float(row.max())
            predictions[image.index] = Prediction(
                image.file, label, class_id, confidence, by_label, self._model, version
            )
        return predictions

    def _read_classes(
        self, response: Any, probabilities: np.ndarray[Any, Any], names: Sequence[str]
    ) -> tuple[np.ndarray[Any, Any], list[str]]:
        """Return class numbers and labels; a model that returns only probabilities leaves the choice to its clients."""
        if "class_id" not in response.outputs or "label" not in response.outputs:
            class_ids = probabilities.argmax(axis=1)
            return class_ids, [names[class_id] for class_id in class_ids]
        class_ids = self._read_numbers(response, "class_id", DT_INT64)
        labels = read_strings(self._find_output(response, "label", DT_STRING))
        if not len(class_ids) == len(labels) == len(probabilities):
            raise UnexpectedResponse(
                f"expected class_id and label of {len(probabilities)} images from {self._target}, got "
                f"{class_ids.shape} and ({len(labels)},)"
            )
        return class_ids, labels

    def _send_files(self, images: Sequence[LoadedImage], deadline_s: float) -> Any:
        tensor = make_tensor(DT_STRING, len(images), string_val=[image.data for image in images])
        return self._classify(FILES_SIGNATURE, {FILES_INPUT: tensor}, deadline_s)

    def _send_pixels(self, images: Sequence[LoadedImage], deadline_s: float) -> Any:
        """Send images without encoding if all are pixels of the model's size; otherwise return None."""
        arrays = [image.pixels for image in images if image.pixels is not None]
        shapes = {array.shape for array in arrays}
        if len(arrays) < len(images) or len(shapes) > 1 or shapes <= self._rejected_shapes:
            return None
        pixels = np.stack(arrays)
        tensor = make_tensor(DT_UINT8, *pixels.shape, tensor_content=pixels.tobytes())
        try:
            return self._classify(PIXELS_SIGNATURE, {PIXELS_INPUT: tensor}, deadline_s)
        except (InvalidArgumentError, RequestRejected):
            self._rejected_shapes |= shapes  # the model has another size; it resizes files only
            return None

    def _classify(self, signature: str, inputs: dict[str, Any], deadline_s: float) -> Any:
        spec = self._make_spec(self._version, signature)
        return self._send(prediction_pb2.PredictRequest(model_spec=spec, inputs=inputs), deadline_s)

    def _find_class_names(self, version: int, count: int, deadline_s: float) -> tuple[str, ...]:
        """Return the class names of a version, cached; the class numbers if the model has no names."""
        if version not in self._class_names:
            spec = self._make_spec(version, LABELS_SIGNATURE)
            inputs = {LABELS_INPUT: make_tensor(DT_INT64, count, int64_val=range(count))}
            try:
                response = self._send(prediction_pb2.PredictRequest(model_spec=spec, inputs=inputs), deadline_s)
                names = read_strings(self._find_output(response, "label", DT_STRING))
            except (InvalidArgumentError, RequestRejected):
                names = []
            if len(set(names)) != count:
                names = [str(class_id) for class_id in range(count)]
            self._class_names[version] = tuple(names)
        class_names = self._class_names[version]
        if len(class_names) != count:
            raise UnexpectedResponse(
                f"expected {len(class_names)} probabilities from {self._target}, one per class, got {count}"
            )
        return class_names

    def _send(self, request: Any, deadline_s: float) -> Any:
        """Send a request; retry while the server cannot be reached or is busy."""
        attempt = 0
        while True:
            attempt += 1
            try:
                timeout_s = max(0.001, deadline_s - time.monotonic())
                return self._predict(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as rpc_error:
                error = make_error(rpc_error, target=self._target, timeout_s=self._timeout_s)
                retry_after = read_retry_after(rpc_error)
            if not isinstance(error, (ConnectionFailed, ServerBusy)):
                raise error
            self._sleep(choose_retry_wait_s(error, attempt, self._retries, deadline_s, retry_after=retry_after))

    def _make_spec(self, version: int | None, signature: str = "") -> Any:
        spec = prediction_pb2.ModelSpec(name=self._model, signature_name=signature)
        if version is not None:
            spec.version.value = version
        return spec

    def _read_numbers(self, response: Any, name: str, dtype: int) -> np.ndarray[Any, Any]:
        try:
            return read_numbers(self._find_output(response, name, dtype))
        except ValueError as error:
            raise UnexpectedResponse(f"the output {name} of {self._target} is invalid: {error}") from error

    def _find_output(self, response: Any, name: str, dtype: int) -> Any:
        if name not in response.outputs or response.outputs[name].dtype != dtype:
            got = {output: tensor.dtype for output, tensor in response.outputs.items()}
            raise UnexpectedResponse(
                f"expected the output {name} of type {dtype} from {self._target}, got the types {got}; "
                f"check that {self._model} is an image classifier"
            )
        return response.outputs[name]


def _open_channel(target: str | None, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    host = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^/:\s]+):([0-9]{1,5})", target or "")
    if not host:
        raise ValueError(f"expected a gRPC address such as 127.0.0.1:8500, or a channel; got {target!r}")
    options = [
        ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_http_proxy", 0 if is_local_host(host[1].strip("[]")) else 1),
        ("grpc.keepalive_time_ms", 60_000),
    ]
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)
