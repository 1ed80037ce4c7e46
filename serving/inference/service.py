"""`InferenceService`: runs the requests of every protocol.

A protocol parses bytes to an `InferenceRequest` and renders an `InferenceResult` to bytes. The service resolves the
version, validates the inputs, and applies the limits and the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serving.errors import InvalidRequest, ModelControlOff, VersionUnloaded
from serving.greenlets import run_blocking
from serving.inference.model_config import read_version_number
from serving.inference.repository import ModelRepository, ModelVersion, VersionStatus
from serving.inference.signatures import Signature, check_inputs, check_rows, count_rows
from serving.inference.statistics import Statistics
from serving.request_context import current_request


@dataclass(eq=False)
class InferenceRequest:
    """A parsed request: the inputs of one signature, which the version has."""

    signature: str
    inputs: Mapping[str, np.ndarray]  # one array per input, of its dtype; strings are object arrays of bytes


@dataclass(eq=False)
class InferenceResult:
    """The outputs of a signature: one array per output, of its dtype."""

    version: ModelVersion
    signature: Signature
    outputs: Mapping[str, np.ndarray]


class InferenceService:
    """Runs inference requests, of at most `max_rows` rows each, on the versions of a repository.

    With `allow_model_control`, requests may load and unload models. `record_outputs` is called with the outputs of each
    request to a version that has a reference in its model info.

    Example:
        >>> version = service.resolve("colours", version="7")
        >>> result = service.predict(version, InferenceRequest("serving_default", {"images": images}))
        >>> result.outputs["class_id"]
    """

    def __init__(
        self,
        repository: ModelRepository,
        *,
        max_rows: int,
        allow_model_control: bool = False,
        record_outputs: Callable[[ModelVersion, Mapping[str, np.ndarray]], None] = lambda *_: None,
    ) -> None:
        self.repository = repository
        self._record_outputs = record_outputs
        self.max_rows = max_rows
        self.allows_model_control = allow_model_control
        # Replaced where several processes serve the same versions.
        self.read_statistics: Callable[[Sequence[ModelVersion]], list[Statistics]] = _own_statistics

    def resolve(self, model: str, *, version: int | str | None = None, label: str | None = None) -> ModelVersion:
        """Return the newest version of a model, or the version with this number or label.

        Protocols resolve the version before they parse the request, because parsing depends on its signatures.

        Raises:
            InvalidRequest: the version is not a number, no version has the label, or both are given.
            ModelNotFound: the model or the version is not available.
            NotReady: the model is still being loaded.
        """
        if version is not None and label is not None:
            raise InvalidRequest("choose a version by its number or by its label, not by both")
        self.name_model(model)
        number = read_version_number(version) if isinstance(version, str) else version
        found = self.repository.resolve(model, version=number, label=label)
        current_request.get().version = found.version
        return found

    def name_model(self, model: str) -> None:
        """Record the model of the current request, for metrics. Only names of served models are recorded."""
        if self.repository.is_named(model):
            current_request.get().model = model

    def predict(self, version: ModelVersion, request: InferenceRequest) -> InferenceResult:
        """Run a signature before the deadline of the current request.

        The version of the result is another one where remote servers have replaced the default version meanwhile.

        Raises:
            InvalidRequest: the inputs do not fit the signature, or the model rejects them.
            TooLarge: the request has more than `max_rows` rows.
            Overloaded: the queue is full, or the deadline cannot be met (load shedding).
            ModelFailed: the model failed, the deadline passed, or the client disconnected.
        """
        signature = version.predictor.signatures[request.signature]
        check_inputs(signature, request.inputs)
        context = current_request.get()
        context.rows = count_rows(signature, request.inputs)
        check_rows(context.rows, self.max_rows)
        started_s, queue_s, model_s = time.perf_counter(), context.queue_s, context.model_s
        try:
            outputs = version.predictor.predict(signature.name, request.inputs, deadline_s=context.deadline_s)
        except VersionUnloaded:
            if version.is_replaceable and (successor := self._find_successor(version, request)):
                return InferenceService.predict(self, successor, request)
            version.statistics.record_failure(time.perf_counter() - started_s)
            raise
        except BaseException:
            version.statistics.record_failure(time.perf_counter() - started_s)
            raise
        version.statistics.record_success(
            context.rows,
            seconds=time.perf_counter() - started_s,
            queue_s=context.queue_s - queue_s,
            model_s=context.model_s - model_s,
        )
        if version.info.reference is not None:
            self._record_outputs(version, outputs)
        return InferenceResult(version, signature, outputs)

    def _find_successor(self, version: ModelVersion, request: InferenceRequest) -> ModelVersion | None:
        """Return the default version that has replaced an unloaded one, if it has the signature of the request."""
        number = self.repository.resolve(version.name).version
        if number == version.version:
            return None
        successor = self.repository.resolve(version.name, version=number)  # as if named: it is not replaced again
        if request.signature not in successor.predictor.signatures:
            return None
        current_request.get().version = number
        return successor

    def status(self, model: str, version: int | str | None = None) -> list[VersionStatus]:
        """Return the statuses of a model's versions, newest first, or of one version.

        Raises:
            InvalidRequest: the version is not a number.
            ModelNotFound: the model or the version does not exist.
            NotReady: the model is still being loaded.
        """
        self.name_model(model)
        return self.repository.versions(model, read_version_number(version) if isinstance(version, str) else version)

    def load_model(self, model: str) -> None:
        """Load a model, also one that was unloaded; see `ModelRepository.load_model`. It may take long.

        Raises:
            ModelControlOff: requests may not load models.
        """
        self._control(model, self.repository.load_model)

    def unload_model(self, model: str) -> None:
        """Take a model out of service until it is loaded; see `ModelRepository.unload_model`.

        Raises:
            ModelControlOff: requests may not unload models.
        """
        self._control(model, self.repository.unload_model)

    def _control(self, model: str, function: Callable[[str], None]) -> None:
        self.name_model(model)
        if not self.allows_model_control:
            raise ModelControlOff("models may not be loaded or unloaded by requests; --allow-model-control allows it")
        run_blocking(function, model)

    @property
    def not_ready_because(self) -> str | None:
        """The reason why the service is not ready, or None if it is ready."""
        return self.repository.not_ready_because


def _own_statistics(versions: Sequence[ModelVersion]) -> list[Statistics]:
    return [version.statistics for version in versions]
