"""The command line: `python -m serving --models-dir models`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from serving.errors import StartupError
from serving.process import configure_logging, exit_process, log_requests_to, open_standard_streams
from serving.process_memory import keep_freed_memory
from serving.server import serve_settings
from serving.settings import LOG_LEVELS, Settings


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
        configure_logging(settings.log_level)
        if settings.access_log:
            log_requests_to(sys.stdout)
        serve_settings(settings)
    except StartupError as error:
        raise click.ClickException(str(error)) from error
    exit_process(0)  # even while a model call hangs


if __name__ == "__main__":
    main()
