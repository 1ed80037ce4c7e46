"""The command line of the client: `python -m client predict FILES|FOLDERS|-`."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import click

from client.errors import ClientError, ImageRejected
from client.images import Picture, find_images
from client.predictions import Prediction
from client.rest import DEFAULT_URL, Client

_SOME_FAILED, _NOT_REACHED, _INTERRUPTED, _PIPE_CLOSED = 1, 3, 130, 141
_NAME_WIDTH, _BAR_WIDTH = 44, 12

_url_option = click.option("--url", default=DEFAULT_URL, show_default=True, show_envvar=True, help="The service.")


@click.group(context_settings={"max_content_width": 110, "auto_envvar_prefix": "CLIENT"})
def main() -> None:
    """Ask a running image classification service.

    Exit codes: 0 every picture was answered; 1 some were not, each named with its reason; 2 wrong usage; 3 the
    service could not be asked; 130 interrupted.
    """


@main.command()
@click.argument("paths", nargs=-1, required=True, metavar="FILES|FOLDERS|-")
@_url_option
@click.option("--model", help="Which model to ask, where several are served.")
@click.option("--model-version", type=click.IntRange(0), help="Which version of it.  [default: the newest]")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Show this many classes.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line, failures included.")
@click.option(
    "--labels-from-folders",
    is_flag=True,
    help="Compare each label with the name of the folder the file is in, and print the accuracy.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pictures a request.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds to wait for a reply.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Send again after a failed connection or a 503, this often.",
)
def predict(
    paths: tuple[str, ...],
    *,
    url: str,
    model: str | None,
    model_version: int | None,
    top: int,
    as_json: bool,
    labels_from_folders: bool,
    batch_size: int,
    timeout_s: float,
    retries: int,
) -> int:
    """Classify pictures: files, all images below folders, or one picture from standard input (-)."""
    files = list(find_images(path for path in paths if path != "-"))
    from_stdin = "-" in paths
    if not files and not from_stdin:
        raise click.UsageError(f"no pictures (by their extension) in {', '.join(paths)}")
    pictures: Iterable[Picture] = chain(files, [sys.stdin.buffer.read()] if from_stdin else [])
    count = len(files) + from_stdin
    failed = right = answered = 0
    try:
        client = Client(
            url, model=model, version=model_version, batch_size=batch_size, timeout_s=timeout_s, retries=retries
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with client, _progress(count) as bar:
        for outcome in client.predict_iter(pictures):
            if isinstance(outcome, ImageRejected):
                failed += 1
                click.echo(f"error: {_printable(str(outcome))}", err=True)
                if as_json:
                    click.echo(json.dumps({"file": outcome.file, "error": outcome.reason}))
            else:
                answered += 1
                right += outcome.file is not None and Path(outcome.file).absolute().parent.name == outcome.label
                click.echo(_json_line(outcome, top=top) if as_json else _table_row(outcome, top=top))
            if bar is not None:
                bar.update(1)
    if labels_from_folders and answered:
        click.echo(f"accuracy {right / answered:.2%} ({right:,} of {answered:,})", err=as_json)
    if failed:
        click.echo(f"{failed:,} of {count:,} pictures failed", err=True)
    return _SOME_FAILED if failed else 0


@main.command()
@_url_option
def status(*, url: str) -> int:
    """Show which models the service has, and whether it is ready (exit code 0) or not (3)."""
    with Client(url, retries=0) as client:
        for model in client.status()["models"]:
            click.echo(f"{model['name']}  version {model['version']}  {model['state']}")
    return 0


def _progress(count: int) -> Any:
    """Return a context manager that gives a progress bar, or `None` where one would be in the way."""
    # Rows on a terminal show how far it is by themselves, and a bar would be torn apart by them.
    if count == 1 or not sys.stderr.isatty() or sys.stdout.isatty():
        return nullcontext()
    return click.progressbar(length=count, label="pictures", show_pos=True, file=sys.stderr)


def _json_line(prediction: Prediction, *, top: int) -> str:
    return json.dumps(
        {
            "file": prediction.file,
            "label": prediction.label,
            "class_id": prediction.class_id,
            "confidence": prediction.confidence,
            "top": [{"label": label, "probability": probability} for label, probability in prediction.top(top)],
            "model": prediction.model,
            "version": prediction.version,
        },
        ensure_ascii=False,
    )


def _table_row(prediction: Prediction, *, top: int) -> str:
    name = _fit(_printable(prediction.file or "-"), _NAME_WIDTH)
    label_width = max(map(_width, prediction.probabilities))
    filled = round(prediction.confidence * _BAR_WIDTH)
    bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
    others = "".join(
        f"   {_printable(label)} {_percent(probability)}" for label, probability in prediction.top(top)[1:]
    )
    return f"{name}  {_pad(_printable(prediction.label), label_width)}  {_percent(prediction.confidence):>7}  {bar}{others}"


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def _printable(text: str) -> str:
    # A file's name may hold anything, a terminal's control sequences among it.
    return "".join(char if char.isprintable() else "�" for char in text)


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _fit(text: str, width: int) -> str:
    """Pad to `width` columns, or keep the end, which tells files apart."""
    if _width(text) > width:
        while _width(text) > width - 1:
            text = text[1:]
        text = f"…{text}"
    return _pad(text, width)


def run_command_line() -> int:
    """Run the command line; return the exit code."""
    try:
        code = main(standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ClientError as error:
        click.echo(f"error: {error}", err=True)
        return _NOT_REACHED
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is buffered still has to go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(run_command_line())
