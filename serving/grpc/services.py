"""TensorFlow Serving's services: PredictionService (Predict, GetModelMetadata) and ModelService.

After `apis/prediction_service.proto` and `apis/model_service.proto`, with the messages of
`servables/tensorflow/predict_util.cc`, `get_model_metadata_impl.cc` and `model_servers/get_model_status_impl.cc`.
Classify, Regress and MultiInference return UNIMPLEMENTED.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

from tensorflow_serving.apis import get_model_metadata_pb2, model_management_pb2, predict_pb2

from serving.access.model_folders import ModelFolders
from serving.errors import InvalidRequest, ModelFailed, ServingError
from serving.greenlets import run_sized
from serving.inference.model_config import read_config
from serving.inference.repository import ModelVersion
from serving.inference.service import InferenceRequest, InferenceService
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, check_rows
from serving.inference.tensor_proto import count_elements, read_tensor, write_tensor
from serving.tfs_messages import make_signature_defs, make_status

logger = logging.getLogger(__name__)


class PredictionService:
    """Runs Predict requests, with input tensors of up to `max_bytes`, and describes signatures."""

    def __init__(self, inference: InferenceService, *, max_bytes: int) -> None:
        self._inference = inference
        self._max_bytes = max_bytes

    def predict(self, request: Any) -> Any:
        """Run a signature of a model."""
        _require_spec(request)
        version = _resolve(self._inference, request.model_spec)
        name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        signature = version.predictor.signatures.get(name)
        if signature is None:
            raise ModelFailed(f'Serving signature key "{name}" not found.', code="FAILED_PRECONDITION")
        _check_names(request.inputs.keys(), signature)
        output_names = _read_filter(request.output_filter, signature)
        for alias, tensor in request.inputs.items():
            if signature.inputs[alias].is_batched and tensor.tensor_shape.dim:  # before a large tensor is copied
                check_rows(tensor.tensor_shape.dim[0].size, self._inference.max_rows)
        inputs = {
            alias: run_sized(count_elements(tensor), read_tensor, tensor, name=alias, max_bytes=self._max_bytes)
            for alias, tensor in request.inputs.items()
        }
        result = self._inference.predict(version, InferenceRequest(name, {**signature.defaults, **inputs}))
        response = predict_pb2.PredictResponse()
        response.model_spec.name = version.name
        response.model_spec.version.value = result.version.version
        response.model_spec.signature_name = name
        for alias in output_names:
            array, tensor = result.outputs[alias], response.outputs[alias]
            run_sized(array.nbytes, write_tensor, tensor, array, dtype_name=signature.outputs[alias].dtype)
        return response

    def get_model_metadata(self, request: Any) -> Any:
        """Describe the signatures of a model."""
        _require_spec(request)
        if not request.metadata_field:
            raise InvalidRequest("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != "signature_def":
                raise InvalidRequest(f"Metadata field {field} is not supported")
        version = _resolve(self._inference, request.model_spec)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = version.name
        response.model_spec.version.value = version.version
        response.metadata["signature_def"].Pack(make_signature_defs(version))
        return response


class ModelService:
    """Reports the state of the models, and replaces the served models by those of allowed folders."""

    def __init__(self, inference: InferenceService, model_folders: ModelFolders) -> None:
        self._inference = inference
        self._model_folders = model_folders

    def get_model_status(self, request: Any) -> Any:
        """Return the state of all versions of a model, or of the requested version."""
        _require_spec(request)
        spec = request.model_spec
        return make_status(self._inference.status(spec.name, spec.version.value if spec.HasField("version") else None))

    def handle_reload_config_request(self, request: Any) -> Any:
        """Serve exactly the models of the new configuration; responds when they are loaded."""
        try:
            configs = read_config(request.config)
            self._model_folders.check(configs)
            logger.info("new configuration: %s", ", ".join(config.name for config in configs) or "no models")
            self._inference.repository.reload(configs)
        except ServingError:
            logger.error("the new configuration could not be fully applied")
            raise
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        return response


def _require_spec(request: Any) -> None:
    if not request.HasField("model_spec"):
        raise InvalidRequest("Missing ModelSpec")


def _resolve(inference: InferenceService, spec: Any) -> ModelVersion:
    if not spec.name:
        raise InvalidRequest("ModelSpec has no name specified.")
    choice = spec.WhichOneof("version_choice")
    return inference.resolve(
        spec.name,
        version=spec.version.value if choice == "version" else None,
        label=spec.version_label if choice == "version_label" else None,
    )


def _check_names(sent: Collection[str], signature: Signature) -> None:
    required, defaults = signature.inputs.keys(), signature.defaults.keys()
    if len(sent) > len(required) or (len(sent) < len(required) and not defaults):
        raise InvalidRequest(
            f"input size does not match signature: {len(sent)}!={len(required)} len({_in_braces(sent)}) != "
            f"len({_in_braces(required)}). Sent extra: {_in_braces(set(sent) - required)}. "
            f"Missing but required: {_in_braces(required - set(sent))}."
        )
    for alias, spec in signature.inputs.items():
        if alias not in sent and alias not in defaults:
            raise InvalidRequest(
                f"Signature input alias: {alias}(feed name: {spec.tensor_name}) not found in request and no default "
                f"value provided. Inputs expected to be in the request {_in_braces(sent)}, or default input alias set: "
                f"{','.join(sorted(defaults))}"
            )
    used = sorted(required & set(sent))
    if len(used) != len(sent):
        raise InvalidRequest(
            f"Inputs contains invalid name. Used request inputs: {','.join(used)}, request input: "
            f"{','.join(sorted(sent))}"
        )


def _read_filter(output_filter: Iterable[str], signature: Signature) -> list[str]:
    """Return the names of the requested outputs, or of all outputs."""
    output_names: list[str] = []
    for alias in output_filter:
        if alias not in signature.outputs:
            raise InvalidRequest(
                f"output tensor alias not found in signature: {alias} "
                f"Outputs expected to be in the set {_in_braces(signature.outputs)}."
            )
        if alias in output_names:
            raise InvalidRequest(f"duplicate output tensor alias: {alias}")
        output_names.append(alias)
    return output_names or list(signature.outputs)


def _in_braces(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"
