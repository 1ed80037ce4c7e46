"""The command line, and the server process: `python -m serving --models-dir models`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from serving.api.app import make_app
from serving.api.flask_app import ServingApp
from serving.errors import StartupError
from serving.http.protocol import SharedState, access_logger
from serving.http.server import listen, run_http_server
from serving.inference.backends import name_remote_models
from serving.inference.model_config import ModelsFolder
from serving.memory import TRIM_BYTES, MemoryBudget, keep_freed_memory, return_freed_memory
from serving.settings import LOG_LEVELS, Settings

logger = logging.getLogger("serving")

# How long a thread computes before another may, where both want to. At Python's 5 ms the model would wait for the
# event loop, with what it has just computed in hand, longer than a call of a small model takes.
SWITCH_INTERVAL_S = 1e-4

MEMORY_INTERVAL_S = 1.0  # between two looks at the memory budget

URGENT_PATHS = frozenset((b"/healthz", b"/readyz", b"/v2/health/live", b"/v2/health/ready"))


@click.command(context_settings={"auto_envvar_prefix": "SERVING", "show_default": True})
@click.option(
    "--models-dir",
    type=click.Path(path_type=Path),
    default=Path("models"),
    help="Folder of the models: <name>/<version>/saved_model.pb.",
)
@click.option(
    "--model-config-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Serve what this TensorFlow Serving model config says, instead of all that is in --models-dir.",
)
@click.option(
    "--remote",
    metavar="HOST:PORT",
    help="Let the TensorFlow Serving at this gRPC address do the inference.",
)
@click.option(
    "--remote-model",
    "remote_models",
    multiple=True,
    help="A model to ask it for; may be repeated.  [default: the names in --models-dir]",
)
@click.option(
    "--require-model",
    "require_models",
    multiple=True,
    envvar="SERVING_REQUIRE_MODEL",
    help="A model without which the service is not ready; may be repeated.  [default: any one model is enough]",
)
@click.option(
    "--poll-interval-s",
    type=float,
    default=Settings.poll_interval_s,
    help="Seconds between two checks for new, changed and deleted versions.",
)
@click.option("--host", default=Settings.host, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--rest-port", type=int, default=Settings.rest_port, help="Port of the HTTP API and the page.")
@click.option("--grpc-port", type=int, default=Settings.grpc_port, help="Port of the gRPC API; 0 for none.")
@click.option(
    "--threads",
    type=int,
    default=Settings.threads,
    show_default=False,
    help="Threads that parse and decode large requests.  [default: the number of cores]",
)
@click.option(
    "--concurrency",
    type=int,
    default=Settings.concurrency,
    show_default=False,
    help="Concurrent calls of each model. Long requests have calls of their own, one fewer, but at least 1.  "
    "[default: the number of cores]",
)
@click.option(
    "--intra-op-threads",
    type=int,
    default=Settings.intra_op_threads,
    help="TensorFlow's threads for one call; more than 1 helps large models that have few requests at a time.",
)
@click.option(
    "--max-batch-size",
    type=int,
    default=Settings.max_batch_size,
    help="Most rows (images) in one call of a model; concurrent requests share calls up to it. 1 turns batching off.",
)
@click.option(
    "--max-queue-size",
    type=int,
    default=Settings.max_queue_size,
    help="While this many rows wait for a model, further requests are refused with 503.",
)
@click.option("--max-request-bytes", type=int, default=Settings.max_request_bytes, help="Largest request body.")
@click.option(
    "--max-image-pixels",
    type=int,
    default=Settings.max_image_pixels,
    help="Largest image in pixels (width x height), checked before it is decoded.",
)
@click.option(
    "--max-image-side",
    type=int,
    default=Settings.max_image_side,
    help="Largest width and largest height of an image, checked before it is decoded.",
)
@click.option("--max-images", type=int, default=Settings.max_images, help="Most images in one form sent to /predict.")
@click.option(
    "--drain-timeout-s",
    type=int,
    default=Settings.drain_timeout_s,
    help="Seconds to finish accepted requests after SIGTERM, SIGHUP or Ctrl-C. A second signal ends the process at "
    "once.",
)
@click.option(
    "--request-timeout-s",
    type=float,
    default=Settings.request_timeout_s,
    help="Deadline of an HTTP request, in seconds. The response is 503 where it cannot be met, and 504 where it has "
    "passed. The header X-Request-Timeout-S shortens it.",
)
@click.option(
    "--max-connections",
    type=int,
    default=Settings.max_connections,
    help="Most open HTTP connections; fewer where the limit on open files (ulimit -n) allows fewer.",
)
@click.option("--max-rows", type=int, default=Settings.max_rows, help="Most rows (images) in one request.")
@click.option(
    "--memory-budget",
    type=int,
    default=Settings.memory_budget,
    show_default=False,
    help="Bytes for all requests that are being read, inflated, parsed and decoded; more requests wait.  "
    "[default: 75 % of what the container or the machine leaves]",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    default=Settings.log_level,
    help="Log messages of this level and above, to standard error.",
)
@click.option("--access-log", is_flag=True, help="Log a line per request, to standard output.")
def main(**options: Any) -> None:
    """Serve the newest version of every model in a folder over HTTP and gRPC.

    The folder is polled: new versions replace old ones without a failed request.

    Every option can also be set in the environment: --rest-port as SERVING_REST_PORT, and so on.
    """
    open_standard_streams()
    keep_freed_memory()
    try:
        settings = Settings(**options)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if settings.access_log:
            log_requests_to(sys.stdout)
        if settings.remote:
            name_remote_models(settings)
        elif not settings.model_config_file:
            ModelsFolder(settings.models_dir)  # there has to be a folder; models may come later
        listener = open_port(settings.host, settings.rest_port, flag="--rest-port")
        if settings.grpc_port:
            open_port(settings.host, settings.grpc_port, flag="--grpc-port").close()  # gRPC opens its own
        app = make_app(settings)
    except StartupError as error:
        raise click.ClickException(str(error)) from error
    serve(app, settings, listener)


def open_standard_streams() -> None:
    """Open the standard streams that are closed, to nowhere, and have a broken one do no harm.

    Else the first sockets would get their descriptors, and what is written to the log would go to a client.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    logging.raiseExceptions = False


def log_requests_to(stream: TextIO) -> None:
    """Have the line of each request written there, apart from the service's own log."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    access_logger.addHandler(handler)
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False


def open_port(host: str, port: int, *, flag: str) -> socket.socket:
    """Listen on a port.

    Raises:
        StartupError: the port is in use, or the address is not one of this machine's.
    """
    try:
        return listen(host, port)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host and {flag}"
        ) from error


def serve(app: ServingApp, settings: Settings, listener: socket.socket) -> NoReturn:
    """Serve the app, its models loaded in the background, until a signal comes; ends the process."""
    # TensorFlow's own lines; what it refuses arrives as exceptions, with the reason in them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Convolutions through oneDNN, which it uses by itself only where there is AVX-512 VNNI: a third faster elsewhere.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    stopping = threading.Event()
    follower = threading.Thread(
        target=follow_models, args=(app, settings, listener.getsockname()[0], stopping), name="models", daemon=True
    )
    app.liveness.watch_thread(follower)
    follower.start()
    threading.Thread(target=watch_memory, args=(app.memory,), name="memory", daemon=True).start()
    run_http_server(
        lambda: SharedState(
            app,
            app.memory,
            max_body_bytes=settings.max_request_bytes,
            request_timeout_s=settings.request_timeout_s,
            threads=settings.threads,
            access_log=settings.access_log,
            urgent_paths=URGENT_PATHS,
        ),
        listener,
        max_connections=settings.max_connections,
        drain_timeout_s=settings.drain_timeout_s,
        on_stop=stopping.set,
        on_second_signal=lambda number: _exit(128 + number),
    )
    if grpc_server := app.extensions.get("grpc_server"):
        grpc_server.stop(grace_s=settings.drain_timeout_s)
    _exit(0)


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


def follow_models(app: ServingApp, settings: Settings, address: str, stopping: threading.Event) -> None:
    """Load the app's models, and poll for what becomes of them. Models that cannot be loaded are tried again.

    Meanwhile the app answers over HTTP already: that it is alive, and not ready. Over gRPC it does so as soon as
    TensorFlow, which the messages come with, is imported.
    """
    repository = app.inference.repository
    names = ", ".join(repository.all_names())
    waiting = f"waiting for a model: <name>/<version>/saved_model.pb in {settings.models_dir}"
    logger.info(
        "listening on http://%s:%d%s, %s",
        settings.host,
        settings.rest_port,
        f" and for gRPC on {settings.host}:{settings.grpc_port}" if settings.grpc_port else "",
        f"loading {names}" if names else waiting,
    )
    try:
        if settings.grpc_port:
            start_grpc(app, settings, address, stopping)
        repository.load()
        app.memory.adapt(in_use=True)
        logger.info("memory budget: %s MB for all requests", f"{app.memory.total_bytes / 1e6:,.0f}")
    except StartupError as error:
        _give_up(str(error))
    except Exception:
        logger.exception("the models could not be loaded")
        _give_up("the models could not be loaded, for a reason that was not foreseen")
    if repository.ready:
        logger.info("ready on http://%s:%d", settings.host, settings.rest_port)
    else:
        logger.error("not ready: %s", repository.not_ready_because)
    repository.poll_forever(settings.poll_interval_s)


def start_grpc(app: ServingApp, settings: Settings, address: str, stopping: threading.Event) -> None:
    """Start the gRPC server on the app's models; it takes no more calls when `stopping` is set.

    Raises:
        StartupError: the port cannot be listened on.
    """
    from serving.grpc.server import GrpcServer

    server = GrpcServer(
        app.inference,
        app.metrics,
        app.memory,
        app.liveness,
        address=f"[{address}]:{settings.grpc_port}" if ":" in address else f"{address}:{settings.grpc_port}",
        threads=settings.threads,
        max_message_bytes=settings.max_request_bytes,
    )
    app.extensions["grpc_server"] = server

    def stop() -> None:
        stopping.wait()
        server.stop(grace_s=settings.drain_timeout_s)

    threading.Thread(target=stop, name="stop-grpc", daemon=True).start()


def _give_up(reason: str) -> NoReturn:
    with contextlib.suppress(OSError):
        click.echo(f"Error: {reason}", err=True)
    _exit(1)


def _exit(code: int) -> NoReturn:
    """End the process, from any thread, even where a call of a model does not come back."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
