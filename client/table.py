"""Predictions as lines of text whose columns stay aligned while more are still to come."""

from __future__ import annotations

import unicodedata

import click

from client.predictions import Prediction

BAR_CELLS = 10
WIDEST_LABEL = 24
NARROWEST_FILE = 12
_EIGHTHS = " ▏▎▍▌▋▊▉"
_GAP = "  "


class Table:
    """Lines of file, label, confidence, a bar, and the next best labels.

    Args:
        file_width: cells for the file's name; a longer one moves the rest of its line to the right.
        top: how many labels a line has.
        terminal_width: cells in a line of the terminal: longer names are cut at their start to fit, and
            there is colour. None where the output is no terminal: nothing is cut.
        ascii_only: draw the bar with #, where the output cannot hold other characters.
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
            # A model's labels are known with its first answer, and with them the widths of all lines.
            self._label_width = min(max(map(width, (prediction.label, *prediction.probabilities))), WIDEST_LABEL)
            if self._terminal_width is not None:
                others = len(_GAP) * 3 + self._label_width + len(percent(1)) + BAR_CELLS
                self._file_width = min(self._file_width, max(self._terminal_width - others - 1, NARROWEST_FILE))
        file = plain(file)
        if self._terminal_width is not None:
            file = cut(file, self._file_width)
        cells = [
            pad(file, self._file_width),
            self._style(pad(plain(prediction.label), self._label_width), bold=True),
            percent(prediction.confidence).rjust(len(percent(1))),
            self._style(self._bar(prediction.confidence), fg="green"),
        ]
        if self._top > 1:
            others_best = (f"{plain(label)} {percent(value)}" for label, value in prediction.top(self._top)[1:])
            cells.append(self._style(", ".join(others_best), dim=True))
        return _GAP.join(cells).rstrip()

    def _bar(self, confidence: float) -> str:
        eighths = round(min(max(confidence, 0), 1) * BAR_CELLS * 8)
        if self._ascii_only:
            return ("#" * round(eighths / 8)).ljust(BAR_CELLS)
        return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(BAR_CELLS)[:BAR_CELLS]

    def _style(self, text: str, **style: bool | str) -> str:
        return text if self._terminal_width is None else click.style(text, **style)  # type: ignore[arg-type]


def percent(share: float) -> str:
    """Return a share of 1 as "93.1 %"."""
    return f"{share * 100:.1f} %"


def plain(text: str) -> str:
    """Return text without what could steer a terminal or break a line: files may be named anything."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "\ufffd" for char in text)


def width(text: str) -> int:
    """Return how many terminal cells text takes: wide characters two, combining ones none (Unicode annex 11)."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def pad(text: str, cells: int) -> str:
    """Return text with spaces after it, up to a number of cells."""
    return text + " " * (cells - width(text))


def cut(text: str, cells: int) -> str:
    """Return the end of a text that is too wide, after an ellipsis: the end tells one path from another."""
    if width(text) <= cells:
        return text
    while width(text) > cells - 1:
        text = text[1:]
    return "…" + text
