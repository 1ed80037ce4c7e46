"""Progress of a run on standard error: a line per epoch and, on a terminal, a progress bar."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from training.history import EpochResult


class ProgressDisplay:
    """Shows the progress of a run.

    Args:
        epochs: to train, counted from 1.
        steps_per_epoch: batches of an epoch.
        images_per_epoch: training images of an epoch.
        console: standard error by default. The bar is drawn on terminals only.
    """

    def __init__(
        self,
        *,
        epochs: range,
        steps_per_epoch: int,
        images_per_epoch: int,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._last_epoch = epochs[-1]
        self._steps_left = len(epochs) * steps_per_epoch
        self._steps = steps_per_epoch
        self._images = images_per_epoch
        self._done_steps = 0
        self._run_started = self._epoch_started = 0.0
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]:>{task.fields[width]}}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %  {task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressDisplay:
        self._run_started = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start_epoch(self, epoch: int) -> None:
        """Start the bar of `epoch`, counted from 1."""
        self._epoch_started = time.perf_counter()
        if self._task is not None:
            self._bar.remove_task(self._task)
        label = f"{epoch}/{self._last_epoch}"
        self._task = self._bar.add_task("", total=self._steps, epoch=label, width=2 * len(str(self._last_epoch)) + 1)

    def update(self, step: int, *, loss: float, accuracy: float) -> None:
        """Show that `step` batches of the epoch are done."""
        assert self._task is not None
        self._done_steps += 1
        now = time.perf_counter()
        images_per_s = step / self._steps * self._images / (now - self._epoch_started)
        self._steps_left -= 1
        # Estimated from the whole run so far, validation included.
        left_s = self._steps_left * (now - self._run_started) / self._done_steps
        self._bar.update(
            self._task,
            completed=step,
            description=f"loss {loss:.4f}  accuracy {accuracy:.4f}  {images_per_s:,.0f} images/s  "
            f"{_minutes(left_s)} left",
        )

    def end_epoch(self, result: EpochResult, *, is_best: bool) -> None:
        """Print the metrics of an epoch, and whether it is the best so far."""
        self._console.print(
            f"epoch {result.epoch:>{len(str(self._last_epoch))}}/{self._last_epoch}  "
            f"loss {result.loss:.4f}  accuracy {result.accuracy:.4f}  "
            f"val loss {result.val_loss:.4f}  val accuracy {result.val_accuracy:.4f}  "
            f"{result.images_per_s:,.0f} images/s  {_minutes(result.seconds)}{'  best' if is_best else ''}",
            soft_wrap=True,
        )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
