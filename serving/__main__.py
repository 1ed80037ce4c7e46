"""The command line, and the server process: `python -m serving --models-dir models`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NoReturn

import click
from flask import Flask
from granian.constants import HTTPModes, Interfaces
from granian.log import LogLevels
from granian.server import MPServer

from serving.app import create_app
from serving.errors import StartupError
from serving.liveness import Liveness
from serving.model_config import ModelsFolder
from serving.models import name_remote_models
from serving.repository import ModelRepository
from serving.settings import LOG_LEVELS, Settings

logger = logging.getLogger("serving")

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


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
    "--poll-interval-s",
    type=float,
    default=Settings.poll_interval_s,
    help="Seconds between two looks for new, changed and vanished versions.",
)
@click.option("--host", default=Settings.host, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--rest-port", type=int, default=Settings.rest_port, help="Port of the HTTP API and the page.")
@click.option("--grpc-port", type=int, default=Settings.grpc_port, help="Port of the gRPC API; 0 for none.")
@click.option(
    "--threads",
    type=int,
    default=Settings.threads,
    show_default="8 per core, at most 64",
    help="Requests answered at the same time; more wait.",
)
@click.option(
    "--concurrency",
    type=int,
    default=Settings.concurrency,
    show_default="the cores",
    help="Calls of a model at the same time.",
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
    help="Most rows (images) in one call of a model; requests that come together share calls up to it. 1: none does.",
)
@click.option(
    "--max-queue-size",
    type=int,
    default=Settings.max_queue_size,
    help="Most rows that wait for a model; more are refused with 503.",
)
@click.option("--max-request-bytes", type=int, default=Settings.max_request_bytes, help="Largest request body.")
@click.option(
    "--max-image-pixels",
    type=int,
    default=Settings.max_image_pixels,
    help="Largest picture (width x height), checked before it is decoded.",
)
@click.option("--max-images", type=int, default=Settings.max_images, help="Most pictures in one request.")
@click.option(
    "--drain-timeout-s",
    type=int,
    default=Settings.drain_timeout_s,
    help="On SIGTERM or Ctrl-C, seconds to finish the requests accepted before it gives up on them.",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default=Settings.log_level)
@click.option("--access-log", is_flag=True, help="Log a line per request, to standard output.")
def main(**options: Any) -> None:
    """Serve the newest version of every model in a folder over HTTP and gRPC.

    The folder is followed: new versions replace old ones without a lost request.

    Every option can also be set in the environment: --rest-port as SERVING_REST_PORT, and so on.
    """
    try:
        settings = Settings(**options)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if settings.remote:
            name_remote_models(settings)
        elif not settings.model_config_file:
            ModelsFolder(settings.models_dir)  # there has to be a model
        address = free_address(settings.host, settings.rest_port, flag="--rest-port")
        if settings.grpc_port:
            free_address(settings.host, settings.grpc_port, flag="--grpc-port")
    except StartupError as error:
        raise click.ClickException(str(error)) from error
    serve(settings, address)


def free_address(host: str, port: int, *, flag: str) -> str:
    """Return the IP address of `host`, once it is sure that its port can be listened on.

    granian's own socket would share the port with another server's (SO_REUSEPORT) instead of failing.

    Raises:
        StartupError: the port is in use, or the address is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host and {flag}"
        ) from error
    return str(address[0])


def serve(settings: Settings, address: str) -> None:
    """Run the server until it is told to stop; exits non-zero if it stopped for another reason."""
    # TensorFlow's own lines; what it refuses arrives as exceptions, with the reason in them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    server = MPServer(
        "serving.app",
        address=address,
        port=settings.rest_port,
        interface=Interfaces.WSGI,
        http=HTTPModes.http1,
        websockets=False,
        workers=1,
        blocking_threads=settings.threads,
        workers_kill_timeout=settings.drain_timeout_s,
        log_access=settings.access_log,
        log_level=LogLevels.info if settings.log_level == "debug" else LogLevels.warning,
    )
    if settings.log_level != "debug":
        # The rest says again what is said here, or advises fewer threads.
        logging.getLogger("_granian").addFilter(lambda record: "Killing" in record.getMessage())
    explained = multiprocessing.Event()  # whether the process that answers has said why it ends
    # Held back from here on, in both processes: a thread of each waits for its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    heeded = {number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    _start_thread(_stop_server_when_told, server, heeded)
    start = partial(start_worker, settings, address, explained=explained)
    try:
        server.serve(target_loader=start, wrap_loader=False)
    except SystemExit:
        if not explained.is_set():
            click.echo("Error: the process that answers requests died; its last log lines say more", err=True)
        raise


def start_worker(settings: Settings, address: str, *, explained: Event) -> Flask:
    """Make the app in the process that answers; its models are loaded in the background."""
    # What is sent to the whole group (Ctrl-C, timeout) is for the parent, which then stops this process.
    os.setpgid(0, 0)
    stopping = threading.Event()
    _start_thread(_stop_worker_when_told, (address, settings.rest_port), stopping)
    _start_thread(_stop_worker_with_parent)
    try:
        app = create_app(settings)
    except StartupError as error:
        _give_up(str(error), explained)
    liveness: Liveness = app.extensions["liveness"]
    liveness.require(_start_thread(answer, app, settings, address, stopping, explained))
    return app


def answer(app: Flask, settings: Settings, address: str, stopping: threading.Event, explained: Event) -> None:
    """Load the app's models, end the process where not one can be served, and follow what becomes of them.

    Meanwhile the app answers over HTTP already: that it is alive, and not ready. Over gRPC it does so as soon as
    TensorFlow, which the messages come with, is imported.
    """
    repository: ModelRepository = app.extensions["repository"]
    logger.info(
        "listening on http://%s:%d%s, loading %s",
        settings.host,
        settings.rest_port,
        f" and for gRPC on {settings.host}:{settings.grpc_port}" if settings.grpc_port else "",
        ", ".join(repository.all_names()),
    )
    try:
        if settings.grpc_port:
            start_grpc(app, settings, address, stopping)
        repository.load()
    except StartupError as error:
        _give_up(str(error), explained)
    except Exception:
        logger.exception("the models could not be loaded")
        _give_up("the models could not be loaded, for a reason that was not foreseen", explained)
    if repository.ready:
        logger.info("ready on http://%s:%d", settings.host, settings.rest_port)
    else:
        logger.error("not ready: %s", repository.not_ready_because)
    repository.watch(settings.poll_interval_s)


def start_grpc(app: Flask, settings: Settings, address: str, stopping: threading.Event) -> None:
    """Start the gRPC server on the app's models; it ends, its calls finished, when `stopping` is set.

    Raises:
        StartupError: the port cannot be listened on.
    """
    from serving.grpc.server import start_grpc_server

    server = start_grpc_server(
        app.extensions["repository"],
        app.extensions["metrics"],
        app.extensions["liveness"],
        address=f"[{address}]:{settings.grpc_port}" if ":" in address else f"{address}:{settings.grpc_port}",
        threads=settings.threads,
        max_message_bytes=settings.max_request_bytes,
    )

    def stop() -> None:
        stopping.wait()
        server.stop(grace=settings.drain_timeout_s).wait()

    # No daemon, so that the process waits for it.
    threading.Thread(target=stop, name="stop-grpc").start()


def _give_up(reason: str, explained: Event) -> NoReturn:
    explained.set()
    click.echo(f"Error: {reason}", err=True)
    os._exit(1)  # the only way out from a thread; the parent then ends with 1 too


def _start_thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=target.__name__, daemon=True)
    thread.start()
    return thread


def _stop_server_when_told(server: MPServer, heeded: set[signal.Signals]) -> None:
    # In a thread and not in a signal handler, which could come between the lock and unlock of the very
    # event that it sets. SIGHUP, for granian a reload, ends the service: its terminal was closed.
    signal.sigwait(heeded)
    server.signal_handler_interrupt()  # type: ignore[no-untyped-call]


def _stop_worker_when_told(address: tuple[str, int], stopping: threading.Event) -> None:
    # granian's own handler loses a signal that comes before it listens, and stands still on a second one.
    signal.sigwait({signal.SIGTERM})
    stopping.set()
    while not _listens(address):
        time.sleep(0.02)
    handle: Any = signal.getsignal(signal.SIGTERM)
    handle(signal.SIGTERM, None)


def _stop_worker_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when it is gone, killed perhaps
        os.kill(os.getpid(), signal.SIGTERM)


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
