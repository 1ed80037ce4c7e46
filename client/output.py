"""What `predict` writes: results to standard output; failures, progress and the end to standard error."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import click

from client.predictions import Prediction
from client.table import Table, plain

_ERASE_LINE = "\r\033[2K"


class Output:
    """The lines of one run, and a context that shows a progress bar where standard error is a terminal.

    Args:
        file_width: cells that the names of the files take.
        count: how many pictures there are to come.
        top: labels per picture; None for one in the table and all in JSON.
        as_json: a JSON object per line instead of the table.
        labels_from_folders: compare each label with the name of the picture's folder.
    """

    def __init__(
        self, *, file_width: int, count: int, top: int | None, as_json: bool, labels_from_folders: bool
    ) -> None:
        self.answered = self.failed = self._right = 0
        self._count = count
        self._top = top
        self._as_json = as_json
        self._labels_from_folders = labels_from_folders
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a name that it cannot hold must not end the run
        self._to_terminal = sys.stdout.isatty()
        self._table = Table(
            file_width=file_width,
            top=top or 1,
            terminal_width=shutil.get_terminal_size().columns if self._to_terminal else None,
            ascii_only=not _can_hold_blocks(sys.stdout.encoding),
        )
        self._shows_bar = count > 1 and sys.stderr.isatty()
        self._bar = click.progressbar(length=count, show_pos=True, file=sys.stderr, hidden=not self._shows_bar)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, traceback)

    def answer(self, file: str, prediction: Prediction) -> None:
        """Write a picture's prediction.

        Raises:
            click.UsageError: its folder is to be its label, and the model has no such label.
        """
        if self._labels_from_folders:
            label = Path(os.path.abspath(file)).parent.name  # noqa: PTH100 - removes .. without following links
            if label not in prediction.probabilities:
                labels = ", ".join(map(plain, prediction.probabilities))
                raise click.UsageError(
                    f"--labels-from-folders: the folder of {plain(file)} is none of the model's labels: {labels[:300]}"
                )
            self._right += label == prediction.label
        self.answered += 1
        if self._as_json:
            record = dataclasses.asdict(prediction) | {"file": file}
            if self._top is not None:
                record["probabilities"] = dict(prediction.top(self._top))
            self._write(json.dumps(record))
        else:
            self._write(self._table.row(file, prediction))
        self._bar.update(1)

    def fail(self, file: str, reason: str) -> None:
        """Write why a picture, or a folder of them, has no prediction."""
        self.failed += 1
        self._write(f"{plain(file)}: {plain(reason)}", to_stderr=True)
        if self._as_json:
            self._write(json.dumps({"file": file, "error": reason}))
        self._bar.update(1)

    def conclude(self) -> None:
        """Write what comes after the last picture."""
        if self._labels_from_folders and self.answered:
            share = self._right / self.answered
            self._write(f"accuracy {share * 100:.2f} % ({self._right:,} of {self.answered:,})", to_stderr=self._as_json)
        if self.failed:
            self._write(f"{self.failed:,} of {self.failed + self.answered:,} failed, as named above", to_stderr=True)

    def break_off(self) -> None:
        """Write how far the run came, which ends before the last picture."""
        if self._count > 1:
            self._write(f"{self.answered:,} of {self._count:,} pictures were answered", to_stderr=True)

    def _write(self, line: str, *, to_stderr: bool = False) -> None:
        if self._shows_bar and (to_stderr or self._to_terminal):
            click.echo(_ERASE_LINE, nl=False, err=True)  # the bar is drawn again, below the line, when it moves
        click.echo(line, err=to_stderr, color=False if os.environ.get("NO_COLOR") else None)


def _can_hold_blocks(encoding: str) -> bool:
    try:
        "█▏".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
