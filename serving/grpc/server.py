"""The gRPC server, beside the HTTP server in the same process, on the same models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from serving.errors import StartupError
from serving.grpc.model_service import ModelService
from serving.grpc.prediction_service import PredictionService
from serving.grpc.service_names import MODEL_SERVICE, PREDICTION_SERVICE, describe_services
from serving.liveness import Liveness
from serving.metrics import Metrics
from serving.repository import ModelRepository

# TensorFlow Serving's own health service knows its services by these short names.
_KNOWN = ("", "PredictionService", "ModelService", PREDICTION_SERVICE, MODEL_SERVICE)


def start_grpc_server(
    repository: ModelRepository,
    metrics: Metrics,
    liveness: Liveness,
    *,
    address: str,
    threads: int,
    max_message_bytes: int,
) -> grpc.Server:
    """Start answering TensorFlow Serving's gRPC API.

    Args:
        repository: the models.
        metrics: is told of every Predict.
        liveness: what the health service tells, beside the repository's readiness.
        address: "host:port".
        threads: calls answered at the same time.
        max_message_bytes: the largest request.

    Raises:
        StartupError: the port cannot be listened on.
    """
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="grpc"),
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(repository, metrics, max_bytes=max_message_bytes), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(repository), server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(repository, liveness), server)
    describe_services()
    reflection.enable_server_reflection(
        (
            PREDICTION_SERVICE,
            MODEL_SERVICE,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {address} for gRPC; choose another with --grpc-port") from error
    server.start()
    return server


class Health(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health`, which asks the repository each time: nothing has to be kept in step.

    Watch is UNIMPLEMENTED, which clients take for "always asked anew": each watcher would hold a thread for good.
    """

    def __init__(self, repository: ModelRepository, liveness: Liveness) -> None:
        self._repository = repository
        self._liveness = liveness

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - the protocol's name
        """Tell whether the service named, or all of it, can answer."""
        if request.service not in _KNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service}")
        return self._reply()

    def _reply(self) -> Any:
        serving = self._repository.ready and self._liveness.problem is None
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if serving else states.NOT_SERVING)
