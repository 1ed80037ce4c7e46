"""What the Open Inference Protocol and Triton's extensions tell about server and models, as documents.

HTTP sends a document as JSON. gRPC sends it as the message of the same fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from serving.errors import InvalidRequest, ModelNotFound, NotReady
from serving.inference.batcher import Batcher
from serving.inference.repository import ModelVersion, VersionStatus
from serving.inference.service import InferenceService
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec
from serving.inference.statistics import Duration, Statistics
from serving.open_inference.requests import find_signature
from serving.open_inference.tensors import datatype_of

SERVER_NAME = "image-classifier-serving"
PLATFORM, BACKEND = "tensorflow_savedmodel", "tensorflow"
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "statistics")
CONTROL_EXTENSION = "model_repository"  # the index is always there, load and unload are not

# The states of Triton's repository index, for those of TensorFlow Serving's status API.
_STATES = {"START": "LOADING", "LOADING": "LOADING", "AVAILABLE": "READY", "UNLOADING": "UNLOADING"}


def describe_server(inference: InferenceService) -> dict[str, Any]:
    """Return the server's name, version and extensions."""
    try:
        version = installed_version(SERVER_NAME)
    except PackageNotFoundError:
        version = "unreleased"  # run from source, not installed
    extensions = [*EXTENSIONS, CONTROL_EXTENSION] if inference.allows_model_control else list(EXTENSIONS)
    return {"name": SERVER_NAME, "version": version, "extensions": extensions}


def explain_not_ready(inference: InferenceService, model: str, version: str | None) -> str | None:
    """Return why a model, or a version of it, is not ready, or None if it is.

    Raises:
        ModelNotFound: it is not known.
        InvalidRequest: the version is not a number.
    """
    try:
        inference.resolve(model, version=version)
    except (NotReady, ModelNotFound) as error:
        is_known = version is None and model in inference.repository.all_names()
        if isinstance(error, ModelNotFound) and not is_known:
            raise
        return str(error)
    return None


def describe_model(
    inference: InferenceService, model: str, version: str | None, signature: str = DEFAULT_SIGNATURE
) -> dict[str, Any]:
    """Return the inputs and outputs of a signature, and the available versions.

    Raises:
        ServingError: see `InferenceService.resolve`, `find_signature` and `datatype_of`.
    """
    found = inference.resolve(model, version=version)
    described = find_signature(found.name, found.predictor.signatures, signature)
    return {
        "name": found.name,
        "versions": [str(available.version) for available in inference.repository.available(found.name)],
        "platform": PLATFORM,
        "inputs": _describe_tensors(described.inputs.values()),
        "outputs": _describe_tensors(described.outputs.values()),
    }


def describe_config(
    inference: InferenceService, model: str, version: str | None, signature: str = DEFAULT_SIGNATURE
) -> dict[str, Any]:
    """Return what Triton's model configuration would say of a signature.

    `max_batch_size` is the largest number of rows in a request, because larger requests than a model call takes are
    split; 0 if the signature has no batch axis, and `dims` are then whole shapes. `dynamic_batching` is left out where
    requests do not share model calls.

    Raises:
        ServingError: see `describe_model`.
    """
    found = inference.resolve(model, version=version)
    described = find_signature(found.name, found.predictor.signatures, signature)
    config: dict[str, Any] = {
        "name": found.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "max_batch_size": inference.max_rows if described.is_batched else 0,
        "input": _configure_tensors(described.inputs.values(), described),
        "output": _configure_tensors(described.outputs.values(), described),
    }
    rows = found.predictor.shared_rows(signature) if isinstance(found.predictor, Batcher) else 1
    if rows > 1:
        config["dynamic_batching"] = {"preferred_batch_size": [rows], "max_queue_delay_microseconds": 0}
    return config


def describe_statistics(inference: InferenceService, model: str | None, version: str | None) -> dict[str, Any]:
    """Return the statistics of all models, of the available versions of one, or of one version.

    Raises:
        ServingError: see `InferenceService.resolve`.
    """
    repository = inference.repository
    if not model:
        versions = [version for name in repository.names() for version in repository.available(name)]
    else:
        found = inference.resolve(model, version=version)
        versions = [found] if version is not None else repository.available(model)
    statistics = inference.read_statistics(versions)
    return {"model_stats": [_describe_statistics(*each) for each in zip(versions, statistics, strict=True)]}


def list_models(inference: InferenceService, *, ready_only: bool) -> list[dict[str, str]]:
    """Return the index of the repository: the versions of all models with their states."""
    repository = inference.repository
    index = []
    for name in repository.all_names():
        statuses = repository.list_versions(name)
        index += [_describe_status(status) for status in statuses]
        if not statuses:
            index.append({"name": name, "version": "", "state": "UNAVAILABLE", "reason": repository.problem(name)})
    return [entry for entry in index if entry["state"] == "READY" or not ready_only]


def check_load_parameters(parameters: Any) -> None:
    """Raise InvalidRequest if a request to load a model brings a configuration or files for it."""
    if parameters:
        raise InvalidRequest("a model is loaded from its own folder: parameters (config, file:...) are not supported")


def _describe_tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": datatype_of(spec).name, "shape": _sizes(spec)} for spec in specs]


def _configure_tensors(specs: Iterable[TensorSpec], signature: Signature) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "data_type": f"TYPE_{datatype_of(spec).name.replace('BYTES', 'STRING')}",
            "dims": _sizes(spec)[1:] if signature.is_batched else _sizes(spec),
        }
        for spec in specs
    ]


def _sizes(spec: TensorSpec) -> list[int]:
    # The protocol cannot express an unknown rank: it is described like one unknown size.
    return [-1 if size is None else size for size in ((None,) if spec.shape is None else spec.shape)]


def _describe_status(status: VersionStatus) -> dict[str, str]:
    state = _STATES.get(status.state, "UNAVAILABLE")
    reason = status.error_message or ("unloaded" if state == "UNAVAILABLE" else "")
    return {"name": status.name, "version": str(status.version), "state": state, "reason": reason}


def _describe_statistics(version: ModelVersion, statistics: Statistics) -> dict[str, Any]:
    """Return the statistics of a version. Triton's times to copy inputs and outputs are part of `compute_infer`."""
    calls = sorted(statistics.calls.copy().items())
    none = _describe_duration(Duration())
    durations: Mapping[str, Duration] = {
        "success": statistics.succeeded,
        "fail": statistics.failed,
        "queue": statistics.queued,
        "compute_infer": statistics.computed,
    }
    return {
        "name": version.name,
        "version": str(version.version),
        "last_inference": statistics.last_request_ms,
        "inference_count": statistics.rows,
        "execution_count": sum(duration.count for _, duration in calls),
        "inference_stats": {
            **{name: _describe_duration(duration) for name, duration in durations.items()},
            "compute_input": none,
            "compute_output": none,
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": none,
                "compute_infer": _describe_duration(duration),
                "compute_output": none,
            }
            for rows, duration in calls
        ],
    }


def _describe_duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": round(duration.total_s * 1e9)}
