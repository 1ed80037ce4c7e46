"""The command line: `python -m client predict PICTURES` and `python -m client status`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from client.client import DEFAULT_BATCH_SIZE, Client, GrpcClient, PictureClient
from client.errors import ClientError
from client.images import MAX_IMAGE_BYTES, find_pictures
from client.output import Output
from client.predictions import Failure
from client.rest import DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, MAX_VERSION
from client.table import plain, width

STDIN = "-"
SOME_FAILED, NO_SERVICE, INTERRUPTED = 1, 3, 130
WIDEST_FILE = 120  # where the output is no terminal, which would set its own limit


class _Commands(click.Group):
    """The commands, with the same end for each when there is no answer and when it is interrupted."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ClientError as error:
            click.echo(f"error: {plain(str(error))}", err=True)
            ctx.exit(NO_SERVICE)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


_url_option = click.option(
    "--url",
    default="http://127.0.0.1:8501",
    show_default=True,
    envvar="CLIENT_URL",
    show_envvar=True,
    help="The service's address.",
)

_grpc_option = click.option(
    "--grpc",
    "grpc_address",
    metavar="HOST:PORT",
    envvar="CLIENT_GRPC",
    show_envvar=True,
    help="Ask over gRPC instead, this service or any TensorFlow Serving; needs --model.",
)


@click.group(cls=_Commands, context_settings={"max_content_width": 110})
def main() -> None:
    """Ask a running image classification service about pictures."""


@main.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(allow_dash=True))
@_url_option
@_grpc_option
@click.option("--model", help="The model to ask; needed where several are served, and with --grpc.")
@click.option(
    "--model-version", "version", type=click.IntRange(0, MAX_VERSION), help="Its version.  [default: the newest]"
)
@click.option(
    "--top", type=click.IntRange(1), help="Labels to show for a picture, best first.  [default: 1; with --json all]"
)
@click.option("--json", "as_json", is_flag=True, help="Write a JSON object per picture and line.")
@click.option(
    "--labels-from-folders",
    is_flag=True,
    help="Take each picture's folder for its true label, and end with the accuracy.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=DEFAULT_BATCH_SIZE, show_default=True, help="Pictures in a request."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="For the answer to one request, retries included.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=DEFAULT_RETRIES,
    show_default=True,
    help="How often to ask again when the connection fails or the service is busy (503).",
)
@click.pass_context
def predict(
    context: click.Context,
    pictures: tuple[str, ...],
    *,
    url: str,
    grpc_address: str | None,
    model: str | None,
    version: int | None,
    top: int | None,
    as_json: bool,
    labels_from_folders: bool,
    batch_size: int,
    timeout_s: float,
    retries: int,
) -> None:
    """Classify PICTURES: files, folders, or - for one picture on standard input.

    Folders are searched to any depth for pictures (JPEG, PNG, WebP, AVIF, BMP, GIF), known by their content. Results
    go to standard output as they come, everything else to standard error. A picture that cannot be read is named, and
    the others go on.

    Exit codes: 0 every picture has its prediction; 1 some have not; 2 wrong usage; 3 the service gives no answer
    (not running, not ready, no such model, failing); 130 interrupted.
    """
    if labels_from_folders and STDIN in pictures:
        raise click.UsageError("--labels-from-folders: a picture on standard input lies in no folder")
    patience = {"timeout_s": timeout_s, "retries": retries, "batch_size": batch_size}
    client = _connect(url, grpc_address, model=model, version=version, **patience)
    file_width, count = _survey(pictures)
    output = Output(
        file_width=file_width, count=count, top=top, as_json=as_json, labels_from_folders=labels_from_folders
    )
    try:
        with client, output:
            found = _expand(pictures, on_failure=output.fail)
            for outcome in client.predict_iter(_read_stdin() if file == STDIN else file for file in found):
                if isinstance(outcome, Failure):
                    output.fail(outcome.file or STDIN, outcome.reason)
                else:
                    output.answer(outcome.file or STDIN, outcome)
    except (ClientError, KeyboardInterrupt):
        output.break_off()
        raise
    output.conclude()
    context.exit(SOME_FAILED if output.failed else 0)


@main.command()
@_url_option
@_grpc_option
@click.option("--model", help="The model to ask about; needed with --grpc, where it cannot be left out.")
@click.pass_context
def status(context: click.Context, *, url: str, grpc_address: str | None, model: str | None) -> None:
    """Show what the service serves, and whether it is ready.

    Exit codes: 0 ready; 2 wrong usage; 3 not ready, or no answer.
    """
    with _connect(url, grpc_address, model=model) as client:
        answer = client.status()
    for served in answer.models:
        line = f"{served.name}  version {served.version}  {served.state}" + (
            f"  {served.error}" if served.error else ""
        )
        click.echo(plain(line))
    click.echo("ready" if answer.ready else plain(f"not ready: {answer.reason}"), err=not answer.ready)
    context.exit(0 if answer.ready else NO_SERVICE)


def _connect(url: str, grpc_address: str | None, *, model: str | None, **options: Any) -> PictureClient:
    try:
        if grpc_address is None:
            return Client(url, model=model, **options)
        if model is None:
            raise ValueError("--grpc needs --model: over gRPC no server tells what it has")
        return GrpcClient(grpc_address, model=model, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _survey(names: tuple[str, ...]) -> tuple[int, int]:
    """Return the width of the widest name, within bounds, and the number of results to come; nothing is read yet."""
    without: list[str] = []
    widest = count = 0
    for file in _expand(names, on_failure=lambda folder, _: without.append(folder)):
        widest = max(widest, width(file))
        count += 1
    return (widest if sys.stdout.isatty() else min(widest, WIDEST_FILE)), count + len(without)


def _expand(names: tuple[str, ...], *, on_failure: Callable[[str, str], None]) -> Iterator[str]:
    """Yield the files and - as given, and the pictures in the folders; report each folder that has none to give."""
    for name in names:
        if name == STDIN or not os.path.isdir(name):  # noqa: PTH112 - unlike Path's, False for what can't be looked at
            yield name
            continue
        errors: list[OSError] = []
        path = None
        for path in find_pictures(name, on_error=errors.append):
            yield str(path)
        for error in errors:
            on_failure(str(error.filename), f"cannot be listed: {error.strerror}")
        if path is None and not errors:
            on_failure(name, "no pictures in this folder: no JPEG, PNG, WebP, AVIF, BMP or GIF file")


def _read_stdin() -> bytes:
    return sys.stdin.buffer.read(MAX_IMAGE_BYTES + 1)


if __name__ == "__main__":
    main(prog_name="python -m client")
