"""OpenTelemetry traces: off, and nothing of it imported, unless the environment names an exporter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving.errors import StartupError

if TYPE_CHECKING:
    from serving.tracing.spans import Tracing

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def make_tracing(environ: Mapping[str, str], *, remote: str | None = None) -> Tracing | None:
    """Return what traces requests, or None if the environment asks for no traces.

    Args:
        environ: the variables of OpenTelemetry: `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_TRACES_EXPORTER` turn traces
            on, `OTEL_TRACES_EXPORTER=none` and `OTEL_SDK_DISABLED=true` turn them off.
        remote: addresses of the remote servers, "host:port[,host:port...]", if the inference is done there.

    Raises:
        StartupError: the extra is not installed, or the exporter is not supported.
    """
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    is_disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or exporter == "none" or not (exporter or any(environ.get(name) for name in _ENDPOINTS)):
        return None
    if exporter not in ("", "otlp", "console"):
        raise StartupError(f"OTEL_TRACES_EXPORTER must be otlp, console or none, not {exporter}")
    protocol = next((value for name in _PROTOCOLS if (value := environ.get(name))), "http/protobuf")
    if exporter != "console" and protocol != "http/protobuf":
        raise StartupError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf, not {protocol}; collectors take it on port 4318"
        )
    try:
        from serving.tracing.spans import Tracing
    except ModuleNotFoundError as error:
        raise StartupError(
            f"the environment asks for traces, but {error.name} is not installed; install the extra [tracing], or set "
            "OTEL_TRACES_EXPORTER=none"
        ) from error
    return Tracing(exporter or "otlp", remote=remote)
