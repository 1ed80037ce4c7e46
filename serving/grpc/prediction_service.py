"""`tensorflow.serving.PredictionService`: Predict and GetModelMetadata.

After `apis/prediction_service.proto`, with the messages of `servables/tensorflow/predict_util.cc` and
`get_model_metadata_impl.cc`. Classify, Regress and MultiInference answer UNIMPLEMENTED.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any

from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2

from serving.errors import InvalidRequest, ModelFailed, ServingError
from serving.greenlets import run_sized
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec, check_rows
from serving.inference.tensor_proto import count_elements, read_tensor, write_tensor
from serving.metrics import Metrics


class PredictionService:
    """Answers from a repository's models.

    Args:
        repository: the models.
        metrics: is told of every Predict.
        max_bytes: how large one input may be.
        max_rows: most rows of a request.
    """

    def __init__(self, repository: ModelRepository, metrics: Metrics, *, max_bytes: int, max_rows: int) -> None:
        self._repository = repository
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._max_rows = max_rows

    def predict(self, request: Any, deadline_s: float | None) -> Any:
        """Run a signature of a model."""
        started_s = time.perf_counter()
        code = ServingError.code
        try:
            with self._metrics.in_flight.track_inprogress():
                reply = self._predict(request, deadline_s)
            code = "OK"
        except ServingError as error:
            code = error.code
            raise
        finally:
            model = request.model_spec.name
            if model in self._repository.all_names():
                seconds = time.perf_counter() - started_s
                self._metrics.observe_tfs_predict(model=model, code=code, seconds=seconds, api="GRPC")
        return reply

    def get_model_metadata(self, request: Any, _: float | None) -> Any:
        """Describe the signatures of a model."""
        if not request.HasField("model_spec"):
            raise InvalidRequest("Missing ModelSpec")
        if not request.metadata_field:
            raise InvalidRequest("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != "signature_def":
                raise InvalidRequest(f"Metadata field {field} is not supported")
        version = resolve(self._repository, request.model_spec)
        reply = get_model_metadata_pb2.GetModelMetadataResponse()
        reply.model_spec.name = version.name
        reply.model_spec.version.value = version.version
        reply.metadata["signature_def"].Pack(_describe_signatures(version.predictor.signatures.values()))
        return reply

    def _predict(self, request: Any, deadline_s: float | None) -> Any:
        if not request.HasField("model_spec"):
            raise InvalidRequest("Missing ModelSpec")
        version = resolve(self._repository, request.model_spec)
        name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        signature = version.predictor.signatures.get(name)
        if signature is None:
            raise ModelFailed(f'Serving signature key "{name}" not found.', code="FAILED_PRECONDITION")
        _check_names(request.inputs.keys(), signature)
        wanted = _read_filter(request.output_filter, signature)
        for alias, tensor in request.inputs.items():
            if signature.inputs[alias].is_batched and tensor.tensor_shape.dim:  # before a large tensor is copied
                check_rows(tensor.tensor_shape.dim[0].size, self._max_rows)
        inputs = {
            alias: run_sized(count_elements(tensor), read_tensor, tensor, name=alias, max_bytes=self._max_bytes)
            for alias, tensor in request.inputs.items()
        }
        outputs = version.predictor.predict(name, {**signature.defaults, **inputs}, deadline_s=deadline_s)
        response = predict_pb2.PredictResponse()
        response.model_spec.name = version.name
        response.model_spec.version.value = version.version
        response.model_spec.signature_name = name
        for alias in wanted:
            array, tensor = outputs[alias], response.outputs[alias]
            run_sized(array.nbytes, write_tensor, tensor, array, dtype_name=signature.outputs[alias].dtype)
        return response


def resolve(repository: ModelRepository, spec: Any) -> ModelVersion:
    """Return the version that a ModelSpec names.

    Raises:
        InvalidRequest: it names no model, or a label that no version has.
        ModelNotFound: there is no such model or version.
    """
    if not spec.name:
        raise InvalidRequest("ModelSpec has no name specified.")
    choice = spec.WhichOneof("version_choice")
    return repository.resolve(
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
    """Return the names of the outputs to answer with: those asked for, or all."""
    wanted: list[str] = []
    for alias in output_filter:
        if alias not in signature.outputs:
            raise InvalidRequest(
                f"output tensor alias not found in signature: {alias} "
                f"Outputs expected to be in the set {_in_braces(signature.outputs)}."
            )
        if alias in wanted:
            raise InvalidRequest(f"duplicate output tensor alias: {alias}")
        wanted.append(alias)
    return wanted or list(signature.outputs)


def _in_braces(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _describe_signatures(signatures: Iterable[Signature]) -> Any:
    described = get_model_metadata_pb2.SignatureDefMap()
    for signature in signatures:
        definition = described.signature_def[signature.name]
        definition.method_name = signature.method_name
        for tensors, specs in ((definition.inputs, signature.inputs), (definition.outputs, signature.outputs)):
            for spec in specs.values():
                _describe_tensor(tensors[spec.name], spec)
        for name, array in signature.defaults.items():
            write_tensor(definition.defaults[name], array, dtype_name=signature.inputs[name].dtype)
    return described


def _describe_tensor(tensor: Any, spec: TensorSpec) -> None:
    tensor.name = spec.tensor_name
    tensor.dtype = types_pb2.DataType.Value(spec.dtype)
    if spec.shape is None:
        tensor.tensor_shape.unknown_rank = True
    for size in spec.shape or ():
        tensor.tensor_shape.dim.add().size = -1 if size is None else size
    tensor.tensor_shape.SetInParent()
