"""Formats predictions as lines of text with aligned columns, one by one."""

from __future__ import annotations

import unicodedata

import click

from client.predictions import Prediction

BAR_CELLS = 10
MAX_LABEL_CELLS = 24
MIN_FILE_CELLS = 12
_EIGHTHS = " ▏▎▍▌▋▊▉"
_GAP = "  "


class Table:
    """Formats lines with the file, the label, the confidence, a bar, and the next most probable labels.

    Args:
        file_width: width of the column of file names, in terminal cells. A longer name shifts the rest of its line.
        top: labels per line.
        terminal_width: width of the terminal in cells: lines have colour, and long file names are truncated at the
            start to fit. None if the output is not a terminal: nothing is truncated.
        ascii_only: draw the bar with #, for encodings without block characters.
    """

    def __init__(self, *, file_width: int, top: int, terminal_width: int | None, ascii_only: bool) -> None:
        self._file_width = file_width
        self._label_width = 0
        self._top = top
        self._terminal_width = terminal_width
        self._ascii_only = ascii_only

    def row(self, file: str, prediction: Prediction) -> str:
        """Return the line of one prediction."""
        if not self._label_width:
            # The first prediction has all labels of the model, which set the column widths.
            self._label_width = min(max(map(width, (prediction.label, *prediction.probabilities))), MAX_LABEL_CELLS)
            if self._terminal_width is not None:
                others = len(_GAP) * 3 + self._label_width + len(percent(1)) + BAR_CELLS
                self._file_width = min(self._file_width, max(self._terminal_width - others - 1, MIN_FILE_CELLS))
        file = plain(file)
        if self._terminal_width is not None:
            file = truncate(file, self._file_width)
        cells = [
            pad(file, self._file_width),
            self._style(pad(plain(prediction.label), self._label_width), bold=True),
            percent(prediction.confidence).rjust(len(percent(1))),
            self._style(self._bar(prediction.confidence), fg="green"),
        ]
        if self._top > 1:
            next_labels = (f"{plain(label)} {percent(value)}" for label, value in prediction.top(self._top)[1:])
            cells.append(self._style(", ".join(next_labels), dim=True))
        if limits := plain(prediction.describe_limits()):
            cells.append(self._style(limits, fg="yellow"))
        return _GAP.join(cells).rstrip()

    def _bar(self, confidence: float) -> str:
        eighths = round(min(max(confidence, 0), 1) * BAR_CELLS * 8)
        if self._ascii_only:
            return ("#" * round(eighths / 8)).ljust(BAR_CELLS)
        return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(BAR_CELLS)[:BAR_CELLS]

    def _style(self, text: str, **style: bool | str) -> str:
        return text if self._terminal_width is None else click.style(text, **style)  # type: ignore[arg-type]


def percent(share: float) -> str:
    """Format a number from 0 to 1 as "93.1 %"."""
    return f"{share * 100:.1f} %"


def plain(text: str) -> str:
    """Replace control characters, which file names may contain and which could control the terminal."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "\ufffd" for char in text)


def width(text: str) -> int:
    """Return the width of text in terminal cells: 2 for wide characters, 0 for combining ones (Unicode annex 11)."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def pad(text: str, cells: int) -> str:
    """Pad text with spaces to a width in terminal cells."""
    return text + " " * (cells - width(text))


def truncate(text: str, cells: int) -> str:
    """Truncate text at the start to a width in terminal cells: the end of a path distinguishes it from others."""
    if width(text) <= cells:
        return text
    while width(text) > cells - 1:
        text = text[1:]
    return "…" + text
