"""gRPC channels to the backends of --remote: balancing, health checks, outlier ejection, keep-alive and retries."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MAX_RESPONSE_BYTES = 1024 * 1024 * 1024

# Predict is idempotent: a model call changes nothing, so a request may be sent again wherever it was lost. Servers of
# gRPC cancel calls that arrive at the moment when they stop; a call that this process cancels is not retried. gRPC ends
# the retries at the deadline of the call. A backoff of milliseconds would lose calls: gRPC 1.85 forgets a retry whose
# timer ends too early (grpc/grpc#41036).
RETRY_POLICY = {
    "maxAttempts": 3,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
# Each attempt with such a code takes a token and each success gives a tenth of one back; below half of the tokens
# nothing is retried. 500 requests in flight can lose their backend at once, and an overloaded backend gets a tenth more
# calls.
RETRY_THROTTLING = {"maxTokens": 1000, "tokenRatio": 0.1}

# A backend of which almost every call fails is left out for a time, at most half of the backends. Errors that a client
# causes count too, hence the high percentage.
OUTLIERS = {
    "interval": "10s",
    "baseEjectionTime": "30s",
    "maxEjectionTime": "300s",
    "maxEjectionPercent": 50,
    "failurePercentageEjection": {"threshold": 95, "minimumHosts": 2, "requestVolume": 20},
}

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A connection whose backend hangs is closed after at most 20 s, so that its requests are retried elsewhere within
    # their deadline of 30 s. gRPC 1.85 waits for the answer to a ping as long as the last option says, by default a
    # minute. More frequent pings would be abuse to a stock server, which allows three without data in between.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.per_rpc_retry_buffer_size", MAX_RESPONSE_BYTES),  # larger requests would not be retried
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment would resolve and balance by itself
)


@dataclass(frozen=True, eq=False)
class Stubs:
    """The services at one or several backends, with their channel; it is closed with the last reference."""

    addresses: tuple[str, ...]
    prediction: Any
    models: Any


class Channels:
    """Makes a channel for each set of backends, and shares it for as long as it is used. Not thread-safe.

    Args:
        authority: the name that requests carry in `:authority`, "host:port".
    """

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._stubs: weakref.WeakValueDictionary[tuple[str, ...], Stubs] = weakref.WeakValueDictionary()

    def connect(self, addresses: Sequence[str]) -> Stubs:
        """Return the stubs of these backends ("10.0.0.1:8500"), among which requests are balanced."""
        key = tuple(sorted(addresses))
        stubs = self._stubs.get(key)
        if stubs is None:
            channel = grpc.insecure_channel(
                make_target(key),
                options=[
                    *OPTIONS,
                    ("grpc.default_authority", self._authority),
                    ("grpc.service_config", json.dumps(make_service_config(is_balanced=len(key) > 1))),
                ],
            )
            stubs = Stubs(
                key,
                prediction_service_pb2_grpc.PredictionServiceStub(channel),
                model_service_pb2_grpc.ModelServiceStub(channel),
            )
            self._stubs[key] = stubs
        return stubs


def make_target(addresses: Sequence[str]) -> str:
    """Return gRPC's target for a list of addresses, which must be of one kind: beside IPv6, IPv4 is mapped."""
    if not any(address.startswith("[") for address in addresses):
        return "ipv4:" + ",".join(addresses)
    mapped = (re.sub(r"^([\d.]+):", r"[::ffff:\1]:", address) for address in addresses)
    return "ipv6:" + ",".join(mapped)


def make_service_config(*, is_balanced: bool) -> dict[str, Any]:
    """Return the service config of a channel; a single backend is neither checked nor ejected: nothing replaces it.

    The health check is of the whole server (an empty service name). gRPC takes a backend without the health service,
    such as a stock TensorFlow Serving, as healthy.
    """
    config: dict[str, Any] = {
        # Not of the ModelService: polls are repeated anyway, and must not use up the tokens.
        "methodConfig": [{"name": [{"service": PREDICTION_SERVICE}], "retryPolicy": RETRY_POLICY}],
        "retryThrottling": RETRY_THROTTLING,
    }
    if is_balanced:
        balancing = {"outlier_detection_experimental": {**OUTLIERS, "childPolicy": [{"round_robin": {}}]}}
        config |= {"loadBalancingConfig": [balancing], "healthCheckConfig": {"serviceName": ""}}
    return config
