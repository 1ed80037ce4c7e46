"""Progress over many images on standard error: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LINE_EVERY_S = 60.0


class ImageProgress:
    """Shows how many of `total` images are done, how fast, and the time left.

    Args:
        total: number of images.
        done: how many of them an earlier run did.
        title: what is done with the images.
    """

    def __init__(self, *, total: int, done: int = 0, title: str = "") -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total = total
        self._title = f"{title}  " if title else ""
        self._first = self._done = done
        self._started = self._shown = time.perf_counter()
        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, images: int) -> None:
        """Show that so many more images are done."""
        self._done += images
        now = time.perf_counter()
        images_per_s = (self._done - self._first) / max(now - self._started, 1e-6)
        left_s = (self._total - self._done) / images_per_s
        speed = f"{format_rate(images_per_s)}  {format_seconds(left_s)} left"
        text = f"{self._title}{self._done:,} of {self._total:,} images  {speed}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, description=text)
        elif now - self._shown >= _LINE_EVERY_S:
            self._shown = now
            self._console.print(text, soft_wrap=True)


def format_rate(images_per_s: float) -> str:
    """Format a speed; a slow one with a decimal."""
    return f"{images_per_s:,.0f} images/s" if images_per_s >= 10 else f"{images_per_s:.1f} images/s"


def format_seconds(seconds: float) -> str:
    """Format a duration as minutes and seconds, with hours from one on: 1:05, 2:00:30."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
