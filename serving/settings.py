"""What the service can be told, validated before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import StartupError
from serving.images.decoding import PILLOW_MAX_PIXELS
from serving.images.limits import ImageLimits
from serving.inference.remote_addresses import parse_addresses
from serving.log_format import LOG_FORMATS

LOG_LEVELS = ("debug", "info", "warning", "error")

# Those that this process may use; macOS only tells how many there are.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MIN_MEMORY_BUDGET = 16 * 1024 * 1024
MAX_WORKERS = 1_024


@dataclass(frozen=True)
class Settings:
    """The service's settings; the defaults are those of the command line.

    Raises:
        StartupError: a value is out of its range.
    """

    models_dir: Path = Path("models")
    models: tuple[tuple[str, Path], ...] = ()  # name and folder of each, instead of all that is in models_dir
    model_config_file: Path | None = None
    remote: str | None = None  # HOST:PORT, or several separated by commas
    remote_models: tuple[str, ...] = ()
    require_models: tuple[str, ...] = ()
    poll_interval_s: float = 1.0
    host: str = "127.0.0.1"
    rest_port: int = 8501  # 0: a free one
    grpc_port: int = 8500  # 0: none
    threads: int = CORES  # they parse and decode; requests wait for the model without a thread
    concurrency: int = CORES
    intra_op_threads: int = 1
    max_batch_size: int = 64
    max_queue_size: int = 4_096
    max_request_bytes: int = 64 * 1024 * 1024
    max_image_pixels: int = 50_000_000
    max_image_side: int = 30_000
    max_images: int = 256
    drain_timeout_s: int = 30
    request_timeout_s: float = 30.0  # as in TensorFlow Serving
    max_connections: int = 10_000
    max_rows: int = 16_384
    memory_budget: int | None = None  # bytes; None: what is free
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    verify_key: Path | None = None
    allow_model_control: bool = False
    log_level: str = "info"
    log_format: str = "text"
    access_log: bool = False
    auth_token_file: Path | None = None
    metrics_public: bool = False
    allow_remote_reload: bool = False
    rate_limit: float | None = None  # requests per second of each caller; None: no limit
    cors_origins: tuple[str, ...] = ()
    forwarded_allow_ips: str = ""  # addresses and networks of trusted proxies, separated by commas
    url_prefix: str = ""
    workers: int | str = 1  # processes; "auto": as many as processors and memory allow

    @property
    def image_limits(self) -> ImageLimits:
        """How large an encoded image may be, uploaded or sent as a tensor."""
        return ImageLimits(max_pixels=self.max_image_pixels, max_side=self.max_image_side)

    def __post_init__(self) -> None:
        for name, smallest, largest in (
            ("rest_port", 0, 65_535),
            ("grpc_port", 0, 65_535),
            ("poll_interval_s", 0.01, 86_400),
            ("concurrency", 1, 1_024),
            ("intra_op_threads", 1, 1_024),
            ("max_batch_size", 1, 65_536),
            ("max_queue_size", 1, 10_000_000),
            ("threads", 1, 1_024),
            ("max_request_bytes", 1, 2**40),
            ("max_image_pixels", 1, PILLOW_MAX_PIXELS),
            ("max_image_side", 1, 1_000_000),
            ("max_images", 1, 100_000),
            ("drain_timeout_s", 1, 3_600),
            ("request_timeout_s", 0.001, 86_400),
            ("max_connections", 1, 1_000_000),
            ("max_rows", 1, 100_000_000),
            ("memory_budget", MIN_MEMORY_BUDGET, 2**50),
            ("rate_limit", 0.001, 1_000_000),
        ):
            value = getattr(self, name)
            if value is not None and not smallest <= value <= largest:
                flag = name.replace("_", "-")
                raise StartupError(f"--{flag} must be from {smallest} to {largest}, not {value}")
        is_count = isinstance(self.workers, int) and 1 <= self.workers <= MAX_WORKERS
        if self.workers != "auto" and not is_count:
            raise StartupError(f"--workers must be from 1 to {MAX_WORKERS}, or auto, not {self.workers}")
        check_model_names(self.models)
        for flag, value in (("--remote", self.remote), ("--model-config-file", self.model_config_file)):
            if self.models and value:
                raise StartupError(f"--model and {flag} both say which models to serve; give one of them")
        if self.remote and self.model_config_file:
            raise StartupError("--remote and --model-config-file: the models are either there or here, not both")
        if self.remote:
            parse_addresses(self.remote)
        if self.remote_models and not self.remote:
            raise StartupError("--remote-model names a model at another server; name that too, with --remote")
        if self.grpc_port and self.grpc_port == self.rest_port:
            raise StartupError(f"--grpc-port and --rest-port are both {self.rest_port}; choose another for one")
        if not re.fullmatch("(/[A-Za-z0-9._~-]+)*", self.url_prefix):
            raise StartupError(
                f"--url-prefix takes a path of letters, digits and . _ ~ - without a slash at its end, such as "
                f"/models-api, not {self.url_prefix}"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise StartupError("--tls-cert and --tls-key belong together: give the certificate and its key")
        if self.tls_client_ca and not self.tls_cert:
            raise StartupError("--tls-client-ca needs --tls-cert and --tls-key: client certificates are a part of TLS")
        if self.verify_key and self.remote:
            raise StartupError("--verify-key and --remote: the remote server loads the models, unverified; drop one")
        if self.log_format not in LOG_FORMATS:
            raise StartupError(f"--log-format must be one of {', '.join(LOG_FORMATS)}, not {self.log_format}")
        if self.log_level not in LOG_LEVELS:
            raise StartupError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level}")


def name_models(models: str | Path | Mapping[str, str | Path]) -> dict[str, Any]:
    """Return the settings of the models that `create_app` and `serve` are given: their folder, or one for each name."""
    if isinstance(models, Mapping):
        return {"models": tuple((name, Path(path)) for name, path in models.items())}
    return {"models_dir": Path(models)}


def check_model_names(models: tuple[tuple[str, Path], ...]) -> None:
    """Check the names of models, which become part of URLs.

    Raises:
        StartupError: a name is empty, has a / or :, or is repeated.
    """
    names = [name for name, _ in models]
    for name in names:
        if not name or re.search("[/:]", name):
            raise StartupError(f"--model: expected a model name without / and :, got {name!r}")
        if names.count(name) > 1:
            raise StartupError(f"--model: {name} is given {names.count(name)} times; each model has one folder")
