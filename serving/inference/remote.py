"""Remote backends: the repository of the models of one or several servers with TensorFlow Serving's gRPC API."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from tensorflow.core.protobuf import error_codes_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2
from typing_extensions import override

from serving.errors import InvalidBackendResponse, ModelFailed, ModelNotFound, NotReady, ServingError
from serving.inference.model_config import ModelConfig
from serving.inference.model_info import ModelInfo, read_label_names
from serving.inference.remote_addresses import AddressResolver
from serving.inference.remote_channels import Channels, Stubs
from serving.inference.remote_predictor import RemotePredictor, error_message
from serving.inference.repository import ModelRepository, ModelVersion, VersionStatus
from serving.inference.saved_model import read_signature_defs
from serving.inference.signatures import Predictor
from serving.inference.statistics import CountedPredictor, Statistics
from serving.quoting import hide_paths, printable

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 5.0

# Of the states that servers report for a version, the first one counts.
_STATES = ("AVAILABLE", "LOADING", "START", "UNLOADING", "END", "UNKNOWN")
_LOST = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)

_Answer = list[VersionStatus] | Exception  # of one server, about one model


class RemoteRepository(ModelRepository):
    """The versions that remote servers report as AVAILABLE: TensorFlow Serving, or this service.

    With several servers, a version is AVAILABLE if at least one server has it. Its requests go to the servers that have
    it. The default version is the one that most servers have; of several such versions, the newest.

    Args:
        address: the servers' gRPC addresses, "host:port[,host:port...]". A name stands for all its addresses.
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
        self._resolver = AddressResolver(address)
        self._channels = Channels(authority=address.partition(",")[0].strip())
        self._servers: dict[str, Stubs] = {}  # each by its own channel, for the polls
        self._backend_problems: dict[str, str] = {}  # of the servers that did not respond to the last poll
        self._predictors: dict[tuple[str, int], RemotePredictor] = {}
        self._defaults: dict[str, ModelVersion] = {}  # read without the lock: replaced as a whole
        self._polled_s: dict[str, float] = {}  # when the last poll of each model began

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
        """See `ModelRepository.resolve`; by default the version that most servers have.

        Also raises InvalidBackendResponse; NotReady if no server can be reached.
        """
        if version is None and label is None and (default := self._defaults.get(name)):
            return default
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

    @property
    @override
    def backends(self) -> Mapping[str, bool]:
        return {address: address not in self._backend_problems for address in self._servers}

    def refresh(self, name: str, version: int, since_s: float, deadline_s: float) -> bool:
        """Return whether a version is still served, by a poll that began after `since_s` of `time.monotonic()`.

        Requests that find the version unloaded at the same time share the poll.
        """
        if self._update_lock.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            try:
                if self._polled_s.get(name, 0.0) < since_s:
                    self._poll_models([name])
            finally:
                self._update_lock.release()
        return version in self._available.get(name, {})

    @override
    def _poll(self) -> None:
        addresses = self._resolver.resolve()
        self._servers = {address: self._channels.connect([address]) for address in addresses}
        self._poll_models(self._names)

    def _poll_models(self, names: Iterable[str]) -> None:
        names = list(names)
        self._polled_s.update(dict.fromkeys(names, time.monotonic()))
        answers = self._ask(names)
        self._report_backends({address: answer for name in names for address, answer in answers[name].items()})
        for name in names:
            try:
                self._update_model(name, answers[name])
            except grpc.RpcError as error:
                self._report(name, NotReady, error_message(error, self._address))
            except Exception as error:  # an invalid response must not affect other models
                self._report_invalid(name, error)

    def _ask(self, names: Sequence[str]) -> dict[str, dict[str, _Answer]]:
        """Ask all servers for the status of all models, at the same time: one that hangs delays no other."""
        calls: dict[str, dict[str, Any]] = {name: {} for name in names}
        for name in names:
            request = get_model_status_pb2.GetModelStatusRequest()
            request.model_spec.name = name
            for address, stubs in self._servers.items():
                calls[name][address] = stubs.models.GetModelStatus.future(request, timeout=POLL_TIMEOUT_S)
        return {name: {address: _read_statuses(name, call) for address, call in calls[name].items()} for name in names}

    def _update_model(self, name: str, answers: Mapping[str, _Answer]) -> None:
        statuses = {address: answer for address, answer in answers.items() if isinstance(answer, list)}
        if not statuses:
            self._report_failures(name, answers)
            return
        holders: dict[int, list[str]] = {}
        for address, answer in statuses.items():
            for status in answer:
                if status.state == "AVAILABLE":
                    holders.setdefault(status.version, []).append(address)
        for version, addresses in holders.items():
            self._serve_version(name, version, self._channels.connect(addresses))
        for status in self._merge(statuses, holders):
            self._set_status(status)
        self._choose_default(name, holders)
        self._unload(name, keep=set(holders))
        self._problems.pop(name, None)

    def _serve_version(self, name: str, version: int, stubs: Stubs) -> None:
        """Make a version available, or let its requests go to the servers that have it now."""
        if version in self._available.get(name, {}):
            self._predictors[name, version].stubs = stubs
            return
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = name
        request.model_spec.version.value = version
        response = stubs.prediction.GetModelMetadata(request, timeout=POLL_TIMEOUT_S)
        described = get_model_metadata_pb2.SignatureDefMap()
        if not response.metadata["signature_def"].Unpack(described):
            raise ValueError("expected a SignatureDefMap as metadata")
        signatures = read_signature_defs(described.signature_def)
        predictor = RemotePredictor(stubs, name, version, signatures, address=self._address)
        info = ModelInfo(read_label_names(predictor))  # model.json stays on the server's disk
        predictor.refresh = partial(self.refresh, name, version)  # not before: it would wait for this poll
        statistics = Statistics()
        wrapped = self._wrap_predictor(name, CountedPredictor(predictor, statistics))
        self._predictors[name, version] = predictor
        self._serve(ModelVersion(name, version, wrapped, info, statistics))
        logger.info("%s version %d is available at %s", name, version, ", ".join(stubs.addresses))

    def _choose_default(self, name: str, holders: Mapping[int, Collection[str]]) -> None:
        """Choose the version that most servers have, of these the newest; see docs/remote.md."""
        others = {other: default for other, default in self._defaults.items() if other != name}
        if holders:
            version = max(holders, key=lambda version: (len(holders[version]), version))
            chosen = self._available[name][version]
            others[name] = replace(chosen, is_replaceable=True)
        self._defaults = others

    @override
    def _unload(self, name: str, *, keep: set[int]) -> None:
        super()._unload(name, keep=keep)
        if not keep:
            self._choose_default(name, {})
        for model, version in list(self._predictors):
            if model == name and version not in keep:
                del self._predictors[model, version]

    def _merge(
        self, statuses: Mapping[str, Sequence[VersionStatus]], holders: Mapping[int, Collection[str]]
    ) -> list[VersionStatus]:
        """Return one status for each version; that of one server, with a note if not all servers have it."""
        merged: dict[int, VersionStatus] = {}
        for answer in statuses.values():
            for status in answer:
                other = merged.setdefault(status.version, status)
                if _STATES.index(status.state) < _STATES.index(other.state):
                    merged[status.version] = status
        count = len(self._servers)
        for version, addresses in holders.items():
            if len(addresses) < count:
                note = f"{len(addresses)} of {count} remote servers have this version: {', '.join(sorted(addresses))}"
                merged[version] = replace(merged[version], error_message=note)
        return list(merged.values())

    def _report_backends(self, answers: Mapping[str, _Answer]) -> None:
        """Log which servers stop and start to respond."""
        problems: dict[str, str] = {}
        for address, answer in answers.items():
            if not isinstance(answer, grpc.RpcError) and isinstance(answer, Exception):
                problems[address] = _describe_invalid(answer, address)
            elif isinstance(answer, grpc.RpcError) and answer.code() != grpc.StatusCode.NOT_FOUND:
                problems[address] = error_message(answer, address)
        if len(self._servers) > 1:
            for address in problems.keys() - self._backend_problems.keys():
                logger.warning("%s", printable(problems[address]))
            for address in self._backend_problems.keys() & answers.keys() - problems.keys():
                logger.info("TensorFlow Serving at %s responds again", address)
        self._backend_problems = problems

    def _report_failures(self, name: str, answers: Mapping[str, _Answer]) -> None:
        """Report why no server has answered. Versions stay available if that may be for a moment (a timeout)."""
        failures = [answer for answer in answers.values() if isinstance(answer, Exception)]
        errors: list[Any] = [failure for failure in failures if isinstance(failure, grpc.RpcError)]
        if not failures:
            self._report(name, NotReady, self._resolver.problem or f"{self._address} has no addresses")
        elif not errors:
            self._report_invalid(name, failures[0])
        elif all(error.code() == grpc.StatusCode.NOT_FOUND for error in errors):
            self._report(name, ModelNotFound, error_message(errors[0], self._address))
        else:
            error = next(error for error in errors if error.code() != grpc.StatusCode.NOT_FOUND)
            self._report(name, NotReady, error_message(error, self._address))
        if len(errors) == len(failures) and all(error.code() in _LOST for error in errors):
            self._unload(name, keep=set())

    def _report_invalid(self, name: str, error: Exception) -> None:
        self._report(name, InvalidBackendResponse, _describe_invalid(error, self._address))

    def _report(self, name: str, kind: type[ServingError], message: str) -> None:
        problem = kind, hide_paths(printable(message))
        if self._problems.get(name) != problem:
            logger.warning("model %s: %s", name, printable(message))
        self._problems[name] = problem


def _describe_invalid(error: Exception, address: str) -> str:
    return f"invalid response from TensorFlow Serving at {address}: {error}"


def _read_statuses(name: str, call: Any) -> _Answer:
    """Wait for the statuses of a model's versions at one server; returns the error of a failed call."""
    states = get_model_status_pb2.ModelVersionStatus.State
    try:
        return [
            VersionStatus(
                name,
                status.version,
                states.Name(status.state),
                error_codes_pb2.Code.Name(status.status.error_code),
                status.status.error_message,
            )
            for status in call.result().model_version_status
        ]
    except Exception as error:  # an unknown state or code is one, too
        return error
