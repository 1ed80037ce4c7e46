"""The gRPC server: runs in the process of the HTTP server and serves the same models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Thread
from typing import Any

import grpc
import uvloop
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

from serving.access.policy import AccessPolicy
from serving.errors import StartupError
from serving.greenlets import LoopGreenlets, lower_priority
from serving.grpc.access import GuardedHandlers
from serving.grpc.handlers import make_handler
from serving.grpc.health import HEALTH_SERVICE, HealthService
from serving.grpc.open_inference import LONG_METHODS, OPEN_INFERENCE_SERVICE, POOL, GrpcInferenceService
from serving.grpc.receiving import CHANNEL_OPTIONS, COPIES, MessageReceiver
from serving.grpc.services import ModelService, PredictionService
from serving.inference.liveness import Liveness
from serving.inference.service import InferenceService
from serving.memory import MemoryBudget
from serving.observer import RequestObserver

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"

# Calls that are not yet processed. gRPC refuses further ones without details, so the limit is high: the batcher does
# the load shedding, with an error message.
MAX_PENDING_CALLS = 100_000

# A client that pings a connection more often than this while no data are sent is disconnected. gRPC's default of 5
# minutes would be too long for the keep-alive of --remote, which finds servers that hang.
MIN_PING_INTERVAL_MS = 5_000
# The age at which the server asks a client to reconnect (GOAWAY), without a failed call, where several processes share
# a port. So a process that leaves the port loses its connections within this time.
AGE_OPTIONS = ("grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms")
OLDEST_CALL_S = 3_600

# How long clients that watch the health have to send their next calls elsewhere, before the server stops.
LEAVE_S = 1.0

_LONG_METHODS = ("HandleReloadConfigRequest", *LONG_METHODS)  # they block for long: they load models

# TensorFlow Serving's health service uses the short names.
_KNOWN = ("", "PredictionService", "ModelService", PREDICTION_SERVICE, MODEL_SERVICE, OPEN_INFERENCE_SERVICE)

# For reflection, the methods with the module and the common name of their messages: <name>Request and <name>Response.
# The official package's modules that describe the services were generated for an old protobuf version and cannot be
# imported.
_DESCRIBED = {
    ("prediction_service", PREDICTION_SERVICE): {
        "Classify": (classification_pb2, "Classification"),
        "Regress": (regression_pb2, "Regression"),
        "Predict": (predict_pb2, "Predict"),
        "MultiInference": (inference_pb2, "MultiInference"),
        "GetModelMetadata": (get_model_metadata_pb2, "GetModelMetadata"),
    },
    ("model_service", MODEL_SERVICE): {
        "GetModelStatus": (get_model_status_pb2, "GetModelStatus"),
        "HandleReloadConfigRequest": (model_management_pb2, "ReloadConfig"),
    },
}


class GrpcServer:
    """Serves all gRPC services on their own port, with an event loop in its own thread.

    Args:
        inference: runs the requests.
        observer: reports every call.
        budget: memory for messages.
        liveness: the health service reports NOT_SERVING while it has a problem.
        policy: decides which calls are admitted.
        address: "host:port".
        threads: worker threads for large requests.
        max_message_bytes: the largest request.
        credentials: `grpc.ServerCredentials` for TLS, or None.
        shared_age_s: the age of connections at which clients open new ones, where other processes listen on the same
            port; None: none does.

    Raises:
        StartupError: listening on the address failed.
    """

    def __init__(
        self,
        inference: InferenceService,
        observer: RequestObserver,
        budget: MemoryBudget,
        liveness: Liveness,
        policy: AccessPolicy,
        *,
        address: str,
        threads: int,
        max_message_bytes: int,
        credentials: Any = None,
        shared_age_s: float | None = None,
    ) -> None:
        self._inference = inference
        self._liveness = liveness
        self._credentials = credentials
        self._shared_age_s = shared_age_s
        self._max_message_bytes = min(max_message_bytes, budget.large.body_limit // COPIES)
        # gRPC logs an error when a client disconnects before its response was sent.
        logging.getLogger("grpc._cython.cygrpc").addFilter(lambda line: "ExecuteBatchError" not in line.getMessage())
        self._loop = uvloop.new_event_loop()
        thread = Thread(target=self._loop.run_forever, name="grpc-loop", daemon=True)
        thread.start()
        liveness.watch_thread(thread)
        start = self._start(address, observer, budget, policy, threads)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()

    def stop(self, *, grace_s: float) -> None:
        """Graceful shutdown: refuse new calls, and wait up to `grace_s` for in-flight calls."""
        asyncio.run_coroutine_threadsafe(self._stop(grace_s), self._loop).result()

    async def _stop(self, grace_s: float) -> None:
        await self._health.drain(min(LEAVE_S, grace_s))
        await self._server.stop(grace_s)

    def _sharing_options(self) -> list[tuple[str, int]]:
        if self._shared_age_s is None:
            return [("grpc.so_reuseport", 0)]
        ages = int(self._shared_age_s * 1000), OLDEST_CALL_S * 1000
        return [("grpc.so_reuseport", 1), *zip(AGE_OPTIONS, ages, strict=True)]

    async def _start(
        self, address: str, observer: RequestObserver, budget: MemoryBudget, policy: AccessPolicy, threads: int
    ) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                *self._sharing_options(),
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", -1),
                *CHANNEL_OPTIONS,
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
                ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ]
        )
        receiver = MessageReceiver(self._max_message_bytes)
        self._health = HealthService(_KNOWN, self._is_serving, receiver, budget)
        make = partial(
            make_handler,
            greenlets=LoopGreenlets(ThreadPoolExecutor(threads, "grpc", initializer=lower_priority)),
            budget=budget,
            receiver=receiver,
            observer=observer,
        )
        prediction = PredictionService(self._inference, max_bytes=self._max_message_bytes)
        models = ModelService(self._inference, policy.model_folders)
        metadata, reload = get_model_metadata_pb2.GetModelMetadataRequest, model_management_pb2.ReloadConfigRequest
        services: dict[str, dict[str, tuple[Any, Any]]] = {
            PREDICTION_SERVICE: {
                "Predict": (prediction.predict, predict_pb2.PredictRequest),
                "GetModelMetadata": (prediction.get_model_metadata, metadata),
            },
            MODEL_SERVICE: {
                "GetModelStatus": (models.get_model_status, get_model_status_pb2.GetModelStatusRequest),
                "HandleReloadConfigRequest": (models.handle_reload_config_request, reload),
            },
            OPEN_INFERENCE_SERVICE: GrpcInferenceService(self._inference, self._liveness).methods(),
            HEALTH_SERVICE: {"Check": (self._health.check, health_pb2.HealthCheckRequest)},
        }
        guarded = GuardedHandlers(policy, observer)
        for service, methods in services.items():
            handlers = {
                name: make(
                    method,
                    request,
                    route=f"/{service}/{name}",
                    is_long=name in _LONG_METHODS,
                    is_tensorflow_serving=service in (PREDICTION_SERVICE, MODEL_SERVICE),
                )
                for name, (method, request) in methods.items()
            }
            if service == HEALTH_SERVICE:
                handlers["Watch"] = self._health.make_watch_handler()
            guarded.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        _describe_services()
        described = (*services, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(described, pool=_Pools()), guarded
        )
        server.add_generic_rpc_handlers((guarded,))
        try:
            if self._credentials is None:
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address} for gRPC; choose another with --grpc-port") from error
        await server.start()
        return server

    def _is_serving(self) -> bool:
        return self._inference.not_ready_because is None and self._liveness.problem is None


class _Pools:
    """For reflection, several descriptor pools as one: ours, and the default one for what ours does not have."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a method of the pools, which raises KeyError for what no pool has."""

        def find(*args: Any) -> Any:
            try:
                return getattr(POOL, name)(*args)
            except KeyError:
                return getattr(descriptor_pool.Default(), name)(*args)

        return find


def _describe_services() -> None:
    """Add TensorFlow Serving's services to the descriptor pool that reflection uses. Idempotent."""
    for (file_name, full_name), methods in _DESCRIBED.items():
        package, _, service_name = full_name.rpartition(".")
        file = descriptor_pb2.FileDescriptorProto(
            name=f"tensorflow_serving/apis/{file_name}.proto",
            package=package,
            syntax="proto3",
            dependency=sorted(module.DESCRIPTOR.name for module, _ in methods.values()),
        )
        service = file.service.add(name=service_name)
        for method, (_, name) in methods.items():
            request, response = f".{package}.{name}Request", f".{package}.{name}Response"
            service.method.add(name=method, input_type=request, output_type=response)
        descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
