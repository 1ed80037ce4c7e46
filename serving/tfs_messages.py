"""TensorFlow Serving's status and metadata messages: gRPC sends them, and REST sends them as JSON.

This module imports TensorFlow, so the REST API imports it lazily.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import error_codes_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

from serving.inference.repository import ModelVersion, VersionStatus
from serving.inference.signatures import TensorSpec
from serving.inference.tensor_proto import write_tensor


def make_status(versions: Iterable[VersionStatus]) -> Any:
    """Return a GetModelStatusResponse for some versions of a model."""
    response = get_model_status_pb2.GetModelStatusResponse()
    for version in versions:
        message = response.model_version_status.add()
        message.version = version.version
        message.state = get_model_status_pb2.ModelVersionStatus.State.Value(version.state)
        message.status.error_code = error_codes_pb2.Code.Value(version.error_code)
        message.status.error_message = version.error_message
    return response


def make_signature_defs(version: ModelVersion) -> Any:
    """Return the SignatureDefMap of a model version."""
    described = get_model_metadata_pb2.SignatureDefMap()
    for signature in version.predictor.signatures.values():
        definition = described.signature_def[signature.name]
        definition.method_name = signature.method_name
        for tensors, specs in ((definition.inputs, signature.inputs), (definition.outputs, signature.outputs)):
            for spec in specs.values():
                _fill_tensor_info(tensors[spec.name], spec)
        for name, array in signature.defaults.items():
            write_tensor(definition.defaults[name], array, dtype_name=signature.inputs[name].dtype)
    return described


def _fill_tensor_info(info: Any, spec: TensorSpec) -> None:
    info.name = spec.tensor_name
    info.dtype = types_pb2.DataType.Value(spec.dtype)
    if spec.shape is None:
        info.tensor_shape.unknown_rank = True
        return
    info.tensor_shape.SetInParent()  # present but empty for a scalar
    for size in spec.shape:
        info.tensor_shape.dim.add().size = -1 if size is None else size
