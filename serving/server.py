"""Runs the service in this process: HTTP on the main thread's event loop, gRPC and the models in other threads."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from serving.api.flask_app import URGENT_PATHS, ServingApp
from serving.app import choose_models, make_app, name_remote_models
from serving.errors import StartupError
from serving.http.protocol import SharedState
from serving.http.server import Balance, listen
from serving.http.server import Server as HttpServer
from serving.memory import TRIM_BYTES, MemoryBudget
from serving.process import SWITCH_INTERVAL_S, configure_metrics, exit_process, import_tensorflow
from serving.process_memory import keep_freed_memory, return_freed_memory
from serving.request_log import RequestLog
from serving.settings import Settings, name_models
from serving.tls import Certificates, TlsFiles
from serving.workers.capacity import choose_worker_count

if TYPE_CHECKING:
    from serving.grpc.server import GrpcServer

logger = logging.getLogger("serving")

MEMORY_INTERVAL_S = 1.0  # between two checks of the memory budget


def serve(
    models: str | Path | Mapping[str, str | Path] = "models", *, port: int = Settings.rest_port, **options: Any
) -> None:
    """Serve the models in a folder over HTTP and gRPC, until SIGTERM, SIGHUP or Ctrl-C; then shut down gracefully.

    Call it from the main thread, which handles the signals. A second signal, and models that cannot be loaded for an
    unforeseen reason, end the process, as with `python -m serving`.

    Args:
        models: the folder: `<name>/<version>/saved_model.pb`; or the name and folder of each model, as for
            `--model`. New versions replace old ones while it runs.
        port: of the HTTP API.
        options: other settings by their names in `serving.Settings`, such as `grpc_port` and `host`.

    Raises:
        StartupError: a setting is invalid, the folder is missing, or a port is in use.

    Example:
        >>> serving.serve("models", port=8501)  # doctest: +SKIP
    """
    keep_freed_memory()
    serve_settings(Settings(**name_models(models), rest_port=port, **options))


def serve_settings(settings: Settings) -> None:
    """Serve what the settings say; see `serve`."""
    if settings.remote:
        name_remote_models(settings)
    else:
        choose_models(settings)  # the folders have to exist; versions may come later
    if (workers := choose_worker_count(settings)) > 1:
        from serving.workers.supervisor import Supervisor

        Supervisor(settings, workers).run()
        return
    certificates = read_certificates(settings)
    listener = open_port(settings.host, settings.rest_port, flag="--rest-port")
    if settings.grpc_port:
        open_port(settings.host, settings.grpc_port, flag="--grpc-port").close()  # gRPC opens its own
    if settings.remote:
        import_tensorflow()  # its messages are in TensorFlow's package
    with RequestLog() as log:
        app = make_app(settings, log=log.add)
        log_start(settings, listener.getsockname()[1], app.inference.repository.all_names())
        ServerRun(app, listener, certificates).run()


def log_start(settings: Settings, rest_port: int, names: Sequence[str], *, processes: int = 1) -> None:
    """Log the addresses and the models."""
    logger.info(
        "listening on %s://%s:%d%s%s, %s",
        "https" if settings.tls_cert else "http",
        settings.host,
        rest_port,
        f" and for gRPC on {settings.host}:{settings.grpc_port}" if settings.grpc_port else "",
        f" with {processes} workers" if processes > 1 else "",
        f"loading {', '.join(names)}"
        if names
        else f"waiting for a model: <name>/<version>/saved_model.pb in {settings.models_dir}",
    )


def read_certificates(settings: Settings) -> Certificates | None:
    """Return the certificates of the service, None without TLS.

    Raises:
        StartupError: a file is unreadable or invalid.
    """
    if not (settings.tls_cert and settings.tls_key):
        return None
    return Certificates(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def open_port(host: str, port: int, *, flag: str, take: Callable[[str, int], socket.socket] = listen) -> socket.socket:
    """Listen on a port, or `take` it in another way.

    Raises:
        StartupError: the port is in use, or the address is not one of this machine's.
    """
    try:
        return take(host, port)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host and {flag}"
        ) from error


class ServerRun:
    """One run of the server, from the first connection to the last response.

    Args:
        app: the service.
        listener: of the HTTP server.
        certificates: for TLS.
        balance: where other processes accept from the same listener.
        shared_age_s: see `GrpcServer`.
    """

    def __init__(
        self,
        app: ServingApp,
        listener: socket.socket,
        certificates: Certificates | None,
        *,
        balance: Balance | None = None,
        shared_age_s: float | None = None,
    ) -> None:
        self._app = app
        self._balance = balance
        self._shared_age_s = shared_age_s
        self._settings = app.settings
        self._listener = listener
        self._certificates = certificates
        self._is_stopping = threading.Event()
        self._grpc_server: GrpcServer | None = None

    def run(self) -> None:
        """Serve until a signal."""
        app, settings = self._app, self._settings
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        configure_metrics()
        # HTTP responds before the models are loaded: alive, and not ready. gRPC does as soon as TensorFlow is imported.
        if self._certificates:
            self._certificates.watch()
        app.watcher.start(before_load=self.before_load, on_error=give_up)
        threading.Thread(target=watch_memory, args=(app.memory,), name="memory", daemon=True).start()
        http_server = HttpServer(
            lambda: SharedState(
                app,
                app.memory,
                max_body_bytes=settings.max_request_bytes,
                request_timeout_s=settings.request_timeout_s,
                threads=settings.threads,
                urgent_paths={path for each in URGENT_PATHS for path in (each, settings.url_prefix.encode() + each)},
                access=app.access,
                report_refused=app.observer.report,
            ),
            max_connections=settings.max_connections,
            drain_timeout_s=settings.drain_timeout_s,
            on_stop=self._is_stopping.set,
            on_second_signal=lambda number: exit_process(128 + number),
            ssl_context=self._certificates.get_ssl_context if self._certificates else None,
            on_lag=self.observe_lag,
            balance=self._balance,
        )
        app.metrics.process.watch_connections(lambda: http_server.connections, limit=http_server.max_connections)
        http_server.run(sockets=[self._listener])
        if self._grpc_server is not None:
            self._grpc_server.stop(grace_s=settings.drain_timeout_s)
        app.observer.close()

    def observe_lag(self, seconds: float) -> None:
        """Record how late the event loop is; called ten times a second, by the event loop."""
        self._app.metrics.process.observe_loop_lag(seconds)

    def before_load(self) -> None:
        """Import TensorFlow and start the gRPC server, before the first model is loaded."""
        import_tensorflow()
        self._start_grpc()

    def _start_grpc(self) -> None:
        """Start the gRPC server; it shuts down when the HTTP server begins to. Raises StartupError for the port."""
        app, settings = self._app, self._settings
        if not settings.grpc_port:
            return
        from serving.grpc.server import GrpcServer

        address: str = self._listener.getsockname()[0]
        server = GrpcServer(
            app.inference,
            app.observer,
            app.memory,
            app.liveness,
            app.policy,
            address=f"[{address}]:{settings.grpc_port}" if ":" in address else f"{address}:{settings.grpc_port}",
            threads=settings.threads,
            max_message_bytes=settings.max_request_bytes,
            credentials=self._certificates.make_grpc_credentials() if self._certificates else None,
            shared_age_s=self._shared_age_s,
        )
        self._grpc_server = server

        def stop() -> None:
            self._is_stopping.wait()
            server.stop(grace_s=settings.drain_timeout_s)

        threading.Thread(target=stop, name="stop-grpc", daemon=True).start()


def watch_memory(budget: MemoryBudget) -> NoReturn:
    """Adapt the memory budget to what models leave, and give memory back to the system after a burst."""
    peak_bytes = 0
    while True:
        time.sleep(MEMORY_INTERVAL_S)
        used_bytes = budget.used_bytes
        peak_bytes = max(peak_bytes, used_bytes)
        if used_bytes < peak_bytes // 2 and peak_bytes > TRIM_BYTES:
            return_freed_memory()
            peak_bytes = used_bytes
        budget.adapt()


def give_up(error: Exception) -> NoReturn:
    """End the process because of an error at its start."""
    if isinstance(error, StartupError):
        reason = str(error)
    else:
        logger.error("the models could not be loaded", exc_info=error)
        reason = "the models could not be loaded, for an unforeseen reason"
    with contextlib.suppress(OSError):
        click.echo(f"Error: {reason}", err=True)
    exit_process(1)
