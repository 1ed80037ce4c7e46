"""Output of `predict`: results to standard output; failures, progress and the summary to standard error."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Self

import click

from client.predictions import Prediction
from client.table import Table, plain

_ERASE_LINE = "\r\033[2K"


class Output:
    """Writes the results of one run. As a context manager, shows a progress bar if standard error is a terminal.

    Args:
        file_width: see `Table`.
        count: the number of results to expect.
        top: labels per image; None for one in the table and all in JSON.
        as_json: write a JSON object per line instead of the table.
        labels_from_folders: compare each label with the name of the image's folder, and report the accuracy.
    """

    def __init__(
        self, *, file_width: int, count: int, top: int | None, as_json: bool, labels_from_folders: bool
    ) -> None:
        self.classified = self.failed = self._correct = 0
        self._count = count
        self._top = top
        self._as_json = as_json
        self._labels_from_folders = labels_from_folders
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # instead of failing at a file name that cannot be encoded
        self._to_terminal = sys.stdout.isatty()
        self._table = Table(
            file_width=file_width,
            top=top or 1,
            terminal_width=shutil.get_terminal_size().columns if self._to_terminal else None,
            ascii_only=not _can_encode_blocks(sys.stdout.encoding),
        )
        self._shows_bar = count > 1 and sys.stderr.isatty()
        self._bar = click.progressbar(length=count, show_pos=True, file=sys.stderr, hidden=not self._shows_bar)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.render_finish()

    def write_prediction(self, file: str, prediction: Prediction) -> None:
        """Write the prediction of an image; raise `click.UsageError` if its true label is not one of the model."""
        if self._labels_from_folders:
            label = Path(os.path.abspath(file)).parent.name  # noqa: PTH100 - removes .. without following links
            if label not in prediction.probabilities:
                labels = ", ".join(map(plain, prediction.probabilities))
                raise click.UsageError(
                    f"--labels-from-folders: the folder of {plain(file)} is not a label of the model: {labels[:300]}"
                )
            self._correct += label == prediction.label
        self.classified += 1
        if self._as_json:
            record = dataclasses.asdict(prediction) | {"file": file}
            if prediction.is_typical is None:
                record = {name: value for name, value in record.items() if value is not None}
            if self._top is not None:
                record["probabilities"] = dict(prediction.top(self._top))
            self._write(json.dumps(record))
        else:
            self._write(self._table.row(file, prediction))
        self._bar.update(1)

    def write_failure(self, file: str, reason: str) -> None:
        """Write why an image, or a folder of images, has no prediction."""
        self.failed += 1
        self._write(f"{plain(file)}: {plain(reason)}", to_stderr=True)
        if self._as_json:
            self._write(json.dumps({"file": file, "error": reason}))
        self._bar.update(1)

    def write_summary(self) -> None:
        """Write the accuracy and the number of failures, after the last image."""
        if self._labels_from_folders and self.classified:
            accuracy = self._correct / self.classified
            self._write(
                f"accuracy {accuracy * 100:.2f} % ({self._correct:,} of {self.classified:,})", to_stderr=self._as_json
            )
        if self.failed:
            self._write(f"{self.failed:,} of {self.failed + self.classified:,} failed, see above", to_stderr=True)

    def write_aborted(self) -> None:
        """Write how many images were classified before the run was aborted."""
        if self._count > 1:
            self._write(f"{self.classified:,} of {self._count:,} images classified", to_stderr=True)

    def _write(self, line: str, *, to_stderr: bool = False) -> None:
        if self._shows_bar and (to_stderr or self._to_terminal):
            click.echo(_ERASE_LINE, nl=False, err=True)  # the bar is redrawn below the line at its next update
        click.echo(line, err=to_stderr, color=False if os.environ.get("NO_COLOR") else None)


def _can_encode_blocks(encoding: str) -> bool:
    try:
        "█▏".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
