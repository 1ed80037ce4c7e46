"""`Server`: the service in a process of its own, for tests and notebooks."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from serving.errors import StartupError

_POLL_S = 0.05
_LOG_LINES = 20  # of the log, in errors


class Server:
    """The service on loopback ports, in a process of its own; a context manager.

    Args:
        models: the folder of the models: `<name>/<version>/saved_model.pb`; or the name and folder of each model, as
            for `--model`.
        start_timeout_s: how long `start` waits until the models are loaded.
        client_cert: a certificate and its key (PEM files) with which `start` connects, where `tls_client_ca` is set.
        options: settings by their names in `serving.Settings`, such as `max_batch_size`. Ports that are not given are
            free ones.

    Example:
        >>> with serving.Server("models") as server:
        ...     print(httpx.get(server.url + "/readyz").json()["ready"])
        True
    """

    def __init__(
        self,
        models: str | Path | Mapping[str, str | Path] = "models",
        *,
        start_timeout_s: float = 120.0,
        client_cert: tuple[str | Path, str | Path] | None = None,
        **options: Any,
    ) -> None:
        if options.get("tls_client_ca") and client_cert is None:
            raise StartupError("tls_client_ca needs client_cert here: without it, nobody can tell when it is ready")
        self._client_cert = client_cert
        self._models = models
        self._start_timeout_s = start_timeout_s
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        free = free_ports(2)
        self._rest_port = int(options.pop("rest_port", free[0]))
        self._grpc_port = int(options.pop("grpc_port", free[1]))

    @property
    def url(self) -> str:
        """The base URL of the HTTP API."""
        return f"{'https' if self._options.get('tls_cert') else 'http'}://127.0.0.1:{self._rest_port}"

    @property
    def grpc_address(self) -> str:
        """The address of the gRPC API, "host:port"."""
        return f"127.0.0.1:{self._grpc_port}"

    @property
    def log(self) -> str:
        """What the server has logged."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def start(self) -> Self:
        """Start the process, and wait until its models are loaded.

        Raises:
            StartupError: it ended, or was not ready in time; the message has the end of its log.
        """
        if self._process is not None:
            raise StartupError("the server has been started already")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            self._command(), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> int:
        """Shut the server down gracefully; returns its exit code, 0 after a graceful shutdown."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=self._options.get("drain_timeout_s", 30) + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        return code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "serving"]
        if isinstance(self._models, Mapping):
            command += [part for name, path in self._models.items() for part in ("--model", f"{name}={path}")]
        else:
            command += ["--models-dir", str(self._models)]
        command += ["--rest-port", str(self._rest_port), "--grpc-port", str(self._grpc_port)]
        for name, value in self._options.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                command += [flag] if value else []
            elif isinstance(value, list | tuple):  # remote_models: --remote-model, several times
                command += [part for item in value for part in (flag.removesuffix("s"), str(item))]
            elif value is not None:
                command += [flag, str(value)]
        return command

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + self._start_timeout_s
        while not self._is_ready():
            problem = ""
            if (code := self._process.poll()) is not None:
                problem = f"the server ended with {code}"
            elif time.monotonic() > deadline_s:
                problem = f"the server was not ready after {self._start_timeout_s:g} s"
            if problem:
                end = "\n".join(self.log.splitlines()[-_LOG_LINES:])
                raise StartupError(f"{problem}; its log:\n{end}")
            time.sleep(_POLL_S)

    def _is_ready(self) -> bool:
        failures = contextlib.suppress(OSError, http.client.HTTPException)
        with failures, contextlib.closing(self._connect()) as connection:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        return False

    def _connect(self) -> http.client.HTTPConnection:
        if not self._options.get("tls_cert"):
            return http.client.HTTPConnection("127.0.0.1", self._rest_port, timeout=5)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is our own process
        if self._client_cert:
            context.load_cert_chain(*self._client_cert)
        return http.client.HTTPSConnection("127.0.0.1", self._rest_port, timeout=5, context=context)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address on which nothing listens."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
