"""The command line: `python -m serving --models-dir models`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from serving.errors import StartupError
from serving.log_format import LOG_FORMATS
from serving.process import configure_logging, end_at_early_sigterm, exit_process, open_standard_streams
from serving.process_memory import keep_freed_memory
from serving.server import serve_settings
from serving.settings import LOG_LEVELS, Settings

_FILE = click.Path(path_type=Path, dir_okay=False)


def _option(flag: str, text: str, **attributes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the option of the setting with the same name; its default is the setting's, and so is its type."""
    default = getattr(Settings, flag.removeprefix("--").replace("-", "_"))
    return click.option(flag, default=default, help=text, **attributes)


def _read_model(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise click.BadParameter(f"expected NAME=PATH, such as pets=/mnt/models, got {text!r}")
    return name, Path(path)


def _read_workers(value: str | int) -> int | str:
    return int(value) if str(value).isdecimal() else value  # the default is a number


@click.command(context_settings={"auto_envvar_prefix": "SERVING", "show_default": True})
@click.option(
    "--models-dir",
    type=click.Path(path_type=Path),
    default=Path("models"),
    help="Folder of the models: <name>/<version>/saved_model.pb.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=_read_model,
    metavar="NAME=PATH",
    envvar="SERVING_MODEL",
    help="Serve the model in this folder, of its versions or of one SavedModel; may be repeated.  "
    "[default: all models in --models-dir]",
    show_default=False,
)
@_option(
    "--model-config-file",
    "Serve what this TensorFlow Serving model config says, instead of all that is in --models-dir.",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@_option(
    "--remote",
    "Let the servers at these gRPC addresses do the inference: TensorFlow Serving, or this service. A name stands for "
    "all its addresses.",
    metavar="HOST:PORT[,...]",
)
@click.option(
    "--remote-model",
    "remote_models",
    multiple=True,
    help="A model to ask them for; may be repeated.  [default: the names in --models-dir]",
)
@click.option(
    "--require-model",
    "require_models",
    multiple=True,
    envvar="SERVING_REQUIRE_MODEL",
    help="A model without which the service is not ready; may be repeated.  [default: any one model is enough]",
)
@_option("--poll-interval-s", "Seconds between two checks for new, changed and deleted versions.")
@_option("--host", "Address to listen on; 0.0.0.0 for all.")
@_option("--rest-port", "Port of the HTTP API and the page; 0 for a free one.")
@_option("--grpc-port", "Port of the gRPC API; 0 for none.")
@_option(
    "--threads", "Threads that parse and decode large requests.  [default: the number of cores]", show_default=False
)
@_option(
    "--concurrency",
    "Concurrent calls of each model. Long requests have calls of their own, one fewer, but at least 1.  "
    "[default: the number of cores]",
    show_default=False,
)
@_option(
    "--workers",
    "Processes that serve, each with all models; auto: as many as processors and memory allow. The limits on "
    "connections and on memory, --threads and --concurrency are divided between them.",
    type=_read_workers,
    metavar="N|auto",
)
@_option(
    "--intra-op-threads",
    "TensorFlow's threads for one call; more than 1 helps large models that have few requests at a time.",
)
@_option(
    "--max-batch-size",
    "Most rows (images) in one call of a model; concurrent requests share calls up to it. 1 turns batching off.",
)
@_option("--max-queue-size", "While this many rows wait for a model, further requests are refused with 503.")
@_option("--max-request-bytes", "Largest request body.")
@_option("--max-image-pixels", "Largest image in pixels (width x height), checked before it is decoded.")
@_option("--max-image-side", "Largest width and largest height of an image, checked before it is decoded.")
@_option("--max-images", "Most images in one form sent to /predict.")
@_option(
    "--drain-timeout-s",
    "Seconds to finish accepted requests after SIGTERM, SIGHUP or Ctrl-C. A second signal ends the process at once.",
)
@_option(
    "--request-timeout-s",
    "Deadline of an HTTP request, in seconds. The response is 503 where it cannot be met, and 504 where it has "
    "passed. The header X-Request-Timeout-S shortens it.",
)
@_option(
    "--max-connections", "Most open HTTP connections; fewer where the limit on open files (ulimit -n) allows fewer."
)
@_option("--max-rows", "Most rows (images) in one request.")
@_option(
    "--memory-budget",
    "Bytes for all requests that are being read, inflated, parsed and decoded; more requests wait.  "
    "[default: 75 % of what the container or the machine leaves]",
    type=int,
)
@_option(
    "--tls-cert", "Certificate with its chain (PEM), for HTTPS and gRPC with TLS; reloaded when it changes.", type=_FILE
)
@_option("--tls-key", "Private key of the certificate (PEM, not encrypted).", type=_FILE)
@_option("--tls-client-ca", "Require client certificates that these authorities issued (PEM).", type=_FILE)
@_option(
    "--verify-key",
    "Serve only versions that were signed with the private key of this public key (PEM); needs the extra 'signing'.",
    type=_FILE,
)
@_option(
    "--allow-model-control",
    "Let requests of the Open Inference Protocol load and unload models.",
    is_flag=True,
)
@_option("--log-level", "Log messages of this level and above, to standard error.", type=click.Choice(LOG_LEVELS))
@_option("--log-format", "Format of all log lines: text, or a JSON object a line.", type=click.Choice(LOG_FORMATS))
@_option("--access-log", "Log a line per request, to standard output.", is_flag=True)
@_option(
    "--auth-token-file",
    "Require one of the bearer tokens in this file, for everything but health checks. Each line is "
    "NAME SCOPE[,SCOPE] sha256:HASH, as the command serving.access prints it.",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@_option("--metrics-public", "Serve the metrics without a token.", is_flag=True)
@_option(
    "--allow-remote-reload",
    "Without tokens, let callers on other machines change the served models.",
    is_flag=True,
)
@_option(
    "--rate-limit",
    "Requests per second of each token, or without tokens of each address; more are refused with 429.",
    type=float,
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    envvar="SERVING_CORS_ORIGIN",
    help="An origin whose pages may call the service, such as https://app.example.com; * for all; may be repeated.",
)
@_option(
    "--forwarded-allow-ips",
    "Proxies whose X-Forwarded-For and X-Forwarded-Proto are believed: addresses and networks, separated by commas.",
    metavar="ADDRESSES",
)
@_option("--url-prefix", "Serve all HTTP routes below this path, such as /models-api.", metavar="PATH")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Serve the newest version of every model in a folder over HTTP and gRPC.

    The folder is polled: new versions replace old ones without a failed request.

    Every option can also be set in the environment: --rest-port as SERVING_REST_PORT, and so on.
    """
    end_at_early_sigterm()
    open_standard_streams()
    keep_freed_memory()
    try:
        # From the environment, as in the container image, it is only a default.
        if options["models"] and context.get_parameter_source("models_dir") is ParameterSource.COMMANDLINE:
            raise StartupError("--model and --models-dir both say which models to serve; give one of them")
        settings = Settings(**options)
        configure_logging(settings.log_level, log_format=settings.log_format, log_requests=settings.access_log)
        serve_settings(settings)
    except StartupError as error:
        raise click.ClickException(str(error)) from error
    exit_process(0)  # even while a model call hangs


if __name__ == "__main__":
    main()
