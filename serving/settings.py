"""What the service can be told, validated before anything starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from serving.errors import StartupError
from serving.images import PILLOW_MAX_PIXELS

LOG_LEVELS = ("debug", "info", "warning", "error")

# A thread waits while its request's body arrives and while TensorFlow computes, so more than cores.
DEFAULT_THREADS = min(64, 8 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Settings:
    """The service's settings; the defaults are those of the command line.

    Raises:
        StartupError: a value is out of its range.
    """

    models_dir: Path
    host: str = "127.0.0.1"
    rest_port: int = 8501
    threads: int = DEFAULT_THREADS
    max_request_bytes: int = 64 * 1024 * 1024
    max_image_pixels: int = 50_000_000
    max_images: int = 256
    drain_timeout_s: int = 30
    log_level: str = "info"
    access_log: bool = False

    def __post_init__(self) -> None:
        for name, largest in (
            ("rest_port", 65_535),
            ("threads", 1_024),
            ("max_request_bytes", 2**40),
            ("max_image_pixels", PILLOW_MAX_PIXELS),
            ("max_images", 100_000),
            ("drain_timeout_s", 3_600),
        ):
            value = getattr(self, name)
            if not 1 <= value <= largest:
                flag = name.replace("_", "-")
                raise StartupError(f"--{flag} must be from 1 to {largest}, not {value}")
        if self.log_level not in LOG_LEVELS:
            raise StartupError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level}")
