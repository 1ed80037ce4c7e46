"""Progress of a run on standard error: a line per epoch and, on a terminal, a progress bar."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from training.history import EpochResult


class ProgressDisplay:
    """Shows the progress of a run; `epochs` are those to train, counted from 1, and steps are batches."""

    def __init__(self, *, epochs: range, steps_per_epoch: int, images_per_epoch: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._last_epoch = epochs[-1]
        self._steps = steps_per_epoch
        self._steps_left = len(epochs) * steps_per_epoch
        self._done_steps = 0
        self._images_per_step = images_per_epoch / steps_per_epoch
        self._run_started = self._epoch_started = 0.0
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(bar_width=24), TextColumn("{task.description}"))
        is_hidden = not self._console.is_terminal
        self._bar = Progress(*columns, console=self._console, transient=True, disable=is_hidden)
        self._task = self._bar.add_task("", total=steps_per_epoch, epoch="")

    def __enter__(self) -> ProgressDisplay:
        self._run_started = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start_epoch(self, epoch: int) -> None:
        """Start the bar of `epoch`, counted from 1."""
        self._epoch_started = time.perf_counter()
        self._bar.reset(self._task, epoch=self._label(epoch))

    def update(self, step: int, *, loss: float, accuracy: float) -> None:
        """Show that `step` batches of the epoch are done."""
        self._done_steps += 1
        self._steps_left -= 1
        now = time.perf_counter()
        images_per_s = step * self._images_per_step / (now - self._epoch_started)
        # Estimated from the whole run so far, validation included.
        left_s = self._steps_left * (now - self._run_started) / self._done_steps
        self._bar.update(
            self._task,
            completed=step,
            description=f"{100 * step // self._steps:>3} %  loss {loss:.4f}  accuracy {accuracy:.4f}  "
            f"{images_per_s:,.0f} images/s  {_minutes(left_s)} left",
        )

    def end_epoch(self, result: EpochResult, *, is_best: bool) -> None:
        """Print the metrics of an epoch, and whether it is the best so far."""
        self._console.print(
            f"epoch {self._label(result.epoch)}  "
            f"loss {result.loss:.4f}  accuracy {result.accuracy:.4f}  "
            f"val loss {result.val_loss:.4f}  val accuracy {result.val_accuracy:.4f}  "
            f"{result.images_per_s:,.0f} images/s  {_minutes(result.seconds)}{'  best' if is_best else ''}",
            soft_wrap=True,
        )

    def _label(self, epoch: int) -> str:
        return f"{epoch:>{len(str(self._last_epoch))}}/{self._last_epoch}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
