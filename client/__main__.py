"""The command line: `python -m client predict IMAGES` and `python -m client status`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from client.client import BatchingClient, Client, GrpcClient
from client.errors import ClientError
from client.images import find_images
from client.options import DEFAULT_BATCH_SIZE, DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, MAX_VERSION
from client.output import Output
from client.predictions import Failure
from client.table import plain, width
from client.tls import TlsFiles
from image_formats.files import MAX_FILE_BYTES

STDIN = "-"
EXIT_SOME_FAILED, EXIT_NO_RESPONSE, EXIT_INTERRUPTED = 1, 3, 130
MAX_FILE_CELLS = 120  # if the output is not a terminal


class _Commands(click.Group):
    """Command group that reports client errors and Ctrl-C, and sets the exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ClientError as error:
            click.echo(f"error: {plain(str(error))}", err=True)
            ctx.exit(EXIT_NO_RESPONSE)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


_url_option = click.option(
    "--url",
    default="http://127.0.0.1:8501",
    show_default=True,
    envvar="CLIENT_URL",
    show_envvar=True,
    help="The address of the service.",
)

_grpc_option = click.option(
    "--grpc",
    "grpc_address",
    metavar="HOST:PORT",
    envvar="CLIENT_GRPC",
    show_envvar=True,
    help="Use gRPC instead, of this service or any TensorFlow Serving; needs --model.",
)

_token_option = click.option(
    "--token", envvar="CLIENT_TOKEN", show_envvar=True, help="The token, where the service requires one."
)

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def _tls_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--grpc-tls", is_flag=True, help="Use TLS with --grpc; --ca and --cert imply it."),
        click.option("--key", type=_FILE, envvar="CLIENT_KEY", show_envvar=True, help="Its private key (PEM)."),
        click.option(
            "--cert",
            type=_FILE,
            envvar="CLIENT_CERT",
            show_envvar=True,
            help="A certificate of your own (PEM), if the service requires one.",
        ),
        click.option(
            "--ca",
            type=_FILE,
            envvar="CLIENT_CA",
            show_envvar=True,
            help="The certificate authority of the service (PEM), if it is not one that the system trusts.",
        ),
    ):
        command = option(command)
    return command


@click.group(cls=_Commands, context_settings={"max_content_width": 110})
def main() -> None:
    """Classify images with a running image classification service."""


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(allow_dash=True))
@_url_option
@_grpc_option
@_token_option
@_tls_options
@click.option("--model", help="The model; required if the service has several, and with --grpc.")
@click.option(
    "--model-version", "version", type=click.IntRange(0, MAX_VERSION), help="Its version.  [default: the newest]"
)
@click.option(
    "--top", type=click.IntRange(1), help="Labels per image, most probable first.  [default: 1; with --json all]"
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object per image and line.")
@click.option(
    "--labels-from-folders",
    is_flag=True,
    help="Use the name of each image's folder as its true label, and report the accuracy.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=DEFAULT_BATCH_SIZE, show_default=True, help="Images per request."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="For one request, including retries.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=DEFAULT_RETRIES,
    show_default=True,
    help="Maximum number of retries when the connection fails or the service is busy (503).",
)
@click.pass_context
def predict(
    context: click.Context,
    /,
    images: tuple[str, ...],
    *,
    url: str,
    grpc_address: str | None,
    token: str | None,
    model: str | None,
    version: int | None,
    top: int | None,
    as_json: bool,
    labels_from_folders: bool,
    batch_size: int,
    timeout_s: float,
    retries: int,
    **tls: Any,
) -> None:
    """Classify IMAGES: files, folders, or - for one image on standard input.

    Folders are searched to any depth for images (JPEG, PNG, WebP, AVIF, BMP, GIF), recognised by their content. Results
    are written to standard output one by one, everything else to standard error. An image that cannot be read is
    reported, and the others are classified.

    Exit codes: 0 all images are classified; 1 some are not; 2 wrong usage; 3 the service returned no predictions (not
    running, not ready, unknown model, failed); 130 interrupted.
    """
    if labels_from_folders and STDIN in images:
        raise click.UsageError("--labels-from-folders: an image on standard input is not in a folder")
    client = _make_client(
        url,
        grpc_address,
        token=token,
        model=model,
        tls=tls,
        version=version,
        timeout_s=timeout_s,
        retries=retries,
        batch_size=batch_size,
    )
    file_width, count = _measure(images)
    output = Output(
        file_width=file_width, count=count, top=top, as_json=as_json, labels_from_folders=labels_from_folders
    )
    try:
        with client, output:
            found = _expand(images, on_failure=output.write_failure)
            for outcome in client.predict_iter(_read_stdin() if file == STDIN else file for file in found):
                if isinstance(outcome, Failure):
                    output.write_failure(outcome.file or STDIN, outcome.reason)
                else:
                    output.write_prediction(outcome.file or STDIN, outcome)
    except (ClientError, KeyboardInterrupt):
        output.write_aborted()
        raise
    output.write_summary()
    context.exit(EXIT_SOME_FAILED if output.failed else 0)


@main.command()
@_url_option
@_grpc_option
@_token_option
@_tls_options
@click.option("--model", help="The model; required with --grpc.")
@click.pass_context
def status(
    context: click.Context,
    /,
    *,
    url: str,
    grpc_address: str | None,
    token: str | None,
    model: str | None,
    **tls: Any,
) -> None:
    """Show the models of the service, and whether it is ready.

    Exit codes: 0 ready; 2 wrong usage; 3 not ready, or no response.
    """
    with _make_client(url, grpc_address, token=token, model=model, tls=tls) as client:
        service = client.status()
    for served in service.models:
        error = f"  {served.error}" if served.error else ""
        click.echo(plain(f"{served.name}  version {served.version}  {served.state}{error}"))
    click.echo("ready" if service.ready else plain(f"not ready: {service.reason}"), err=not service.ready)
    context.exit(0 if service.ready else EXIT_NO_RESPONSE)


def _make_client(
    url: str,
    grpc_address: str | None,
    *,
    token: str | None,
    model: str | None,
    tls: dict[str, Any],
    **options: Any,
) -> BatchingClient:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        files = TlsFiles(tls["ca"], tls["cert"], tls["key"])
        if grpc_address is None:
            verify = files.make_ssl_context() if files != TlsFiles() else True
            return Client(url, headers=headers, model=model, verify=verify, **options)
        if model is None:
            raise ValueError("--grpc needs --model: the gRPC API cannot list the models of a server")
        credentials = files.make_grpc_credentials() if tls["grpc_tls"] or files != TlsFiles() else None
        return GrpcClient(grpc_address, metadata=list(headers.items()), model=model, credentials=credentials, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _measure(names: tuple[str, ...]) -> tuple[int, int]:
    """Return the width of the column of file names, and the number of results, without reading the images."""
    failed: list[str] = []
    widest = count = 0
    for file in _expand(names, on_failure=lambda folder, _: failed.append(folder)):
        widest = max(widest, width(file))
        count += 1
    return (widest if sys.stdout.isatty() else min(widest, MAX_FILE_CELLS)), count + len(failed)


def _expand(names: tuple[str, ...], *, on_failure: Callable[[str, str], None]) -> Iterator[str]:
    """Yield the files and - as given, and the images in the folders; report each folder without images."""
    for name in names:
        if name == STDIN or not os.path.isdir(name):  # noqa: PTH112 - unlike Path.is_dir, False if access is denied
            yield name
            continue
        errors: list[OSError] = []
        path = None
        for path in find_images(name, on_error=errors.append):
            yield str(path)
        for error in errors:
            on_failure(str(error.filename), f"cannot be listed: {error.strerror}")
        if path is None and not errors:
            on_failure(name, "no images in this folder: expected JPEG, PNG, WebP, AVIF, BMP or GIF files")


def _read_stdin() -> bytes:
    return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)


if __name__ == "__main__":
    main(prog_name="python -m client")
