"""Defaults and validation of the options that the HTTP and the gRPC client share."""

from __future__ import annotations

import ipaddress
import math

DEFAULT_BATCH_SIZE = 64  # the service's default maximum for one call of a model
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_RETRIES = 3
MAX_VERSION = 2**63 - 1  # model versions are int64


def validate_options(*, model: str | None, version: int | None, timeout_s: float, retries: int) -> None:
    """Raise ValueError if an option of a client is out of range."""
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s must be more than 0 seconds, not {timeout_s}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, not {retries}")
    if model == "":
        raise ValueError("model must not be empty; omit it if the service has only one model")
    if version is not None and not 0 <= version <= MAX_VERSION:
        raise ValueError(f"version must be from 0 to {MAX_VERSION}, not {version}")


def is_local_host(host: str) -> bool:
    """Return whether a host name or address is this machine, which a proxy on another machine cannot reach."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
