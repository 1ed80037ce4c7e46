"""The report of a run: `report.md` and its plots."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from training.config import TrainingConfig
from training.data import Dataset
from training.evaluation.guard_evaluation import GuardEvaluation
from training.evaluation.guard_section import describe_guard, plot_atypical, plot_roc
from training.evaluation.metrics import CALIBRATION_BINS, CalibratedEvaluation
from training.evaluation.plots import plot_calibration, plot_confusion, plot_curves, render_png
from training.evaluation.sample_sheet import plot_samples
from training.history import EpochResult
from training.run_dir import RunDir
from training.shell_command import format_command

# Shown in the command even where they are the default.
_ALWAYS_SHOWN = ("dataset", "variant", "preset", "loop", "dtype", "epochs", "seed")
_EPOCH_COLUMNS = ("epoch", "loss", "accuracy", "val loss", "val accuracy", "learning rate", "images/s", "seconds")


def write_report(
    run: RunDir,
    *,
    config: TrainingConfig,
    dataset: Dataset,
    test: CalibratedEvaluation,
    mirrored: CalibratedEvaluation | None,
    best: EpochResult,
    guard: GuardEvaluation | None = None,
) -> Path:
    """Write `report.md` and its plots into the run directory.

    Args:
        run: the run, with its history on disk.
        config: of the run.
        dataset: the data of the run.
        test: evaluation on the test images.
        mirrored: the same with horizontal-flip test-time augmentation, if it was requested.
        best: metrics of the epoch whose weights were kept.
        guard: evaluation of the guarded signatures, for a section of its own.

    Returns:
        The path of `report.md`.
    """
    # A run killed between saving its best checkpoint and its history has a best epoch that the history lacks.
    by_epoch = {result.epoch: result for result in (*run.read_history(), best)}
    history = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    evaluation, names = test.evaluation, dataset.class_names
    plots = {
        "loss": plot_curves(history, quantity="loss", best_epoch=best.epoch),
        "accuracy": plot_curves(history, quantity="accuracy", best_epoch=best.epoch),
        "confusion": plot_confusion(evaluation.confusion, names),
        "calibration": plot_calibration(test.uncalibrated, evaluation.calibration, temperature=test.temperature),
        "samples": plot_samples(dataset.test.images, dataset.test.labels, test.probabilities, names),
    }
    if guard:
        plots["typicality"] = plot_roc(guard)
        plots["atypical"] = plot_atypical(dataset, guard, test.probabilities)
    return run.write_report(
        _markdown(config, dataset, test, mirrored, history, best, limits=describe_guard(guard) if guard else ""),
        {name: render_png(figure) for name, figure in plots.items()},
    )


def _markdown(
    config: TrainingConfig,
    dataset: Dataset,
    test: CalibratedEvaluation,
    mirrored: CalibratedEvaluation | None,
    history: Sequence[EpochResult],
    best: EpochResult,
    *,
    limits: str,
) -> str:
    evaluation = test.evaluation
    results = [
        ("training, during the epoch", f"{best.loss:.4f}", f"{best.accuracy:.2%}"),
        ("validation", f"{best.val_loss:.4f}", f"{best.val_accuracy:.2%}"),
        ("**test**", f"**{evaluation.loss:.4f}**", f"**{evaluation.accuracy:.2%}**"),
    ]
    if mirrored:
        loss, accuracy = mirrored.evaluation.loss, mirrored.evaluation.accuracy
        results.append(("test, with horizontal-flip TTA", f"{loss:.4f}", f"{accuracy:.2%}"))
    height, width, _ = dataset.train.images.shape[1:]
    classes = (
        (_escape(c.name), _percent(c.precision), _percent(c.recall), _percent(c.f1), f"{c.support:,}")
        for c in evaluation.per_class
    )
    epochs = (
        (
            f"{result.epoch}{' (best)' if result.epoch == best.epoch else ''}",
            f"{result.loss:.4f}",
            f"{result.accuracy:.2%}",
            f"{result.val_loss:.4f}",
            f"{result.val_accuracy:.2%}",
            f"{result.learning_rate:.3g}",
            f"{result.images_per_s:,.0f}",
            f"{result.seconds:.1f}",
        )
        for result in history
    )
    return f"""# {_escape(dataset.name)}: {evaluation.accuracy:.2%} of {evaluation.count:,} test images

The `{config.variant}` network, trained with the `{config.loop}` loop on {len(dataset.train.labels):,} images of \
{height}x{width} pixels in {len(dataset.class_names)} classes ({_escape(dataset.source)}); a tenth of them is the \
validation split. Evaluated on the test images with the weights of epoch {best.epoch}, which had the lowest validation \
loss.

{_table(("", "loss", "accuracy"), results)}

Train it again:

```sh
{_command(config)}
```

![Loss by epoch](loss.png) ![Accuracy by epoch](accuracy.png)

The circle marks the epoch whose weights are kept; dashed lines mark reductions of the learning rate.

## By class

{_table(("class", "precision", "recall", "F1", "images"), classes)}

![Confusion matrix](confusion.png)

## Confidence

The logits are divided by a temperature of {test.temperature:.3f}, fitted on the validation images, in the exported \
model too. Expected calibration error: {test.uncalibrated.expected_calibration_error:.4f} before, \
{evaluation.calibration.expected_calibration_error:.4f} after. It is the mean absolute difference of confidence and \
accuracy in {CALIBRATION_BINS} bins, weighted by their images.

![Accuracy by confidence](calibration.png)

## Samples

![Correct predictions and confident errors](samples.png)

{limits}
## Configuration

{_table(("setting", "value"), _settings(config, dataset))}

## Epochs

{_table(_EPOCH_COLUMNS, epochs)}
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    alignment = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, alignment, *rows))


def _settings(config: TrainingConfig, dataset: Dataset) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        yield field.name.replace("_", " "), _escape(_text(value)) if value is not None else "\N{EN DASH}"
    yield "training images", f"{len(dataset.train.labels):,}"
    yield "test images", f"{len(dataset.test.labels):,}"
    yield "content hash of the data", f"`{dataset.content_hash}`"


def _command(config: TrainingConfig) -> str:
    """Return the command that repeats this run."""
    words = ["train"]
    defaults = TrainingConfig.fill_in(variant=config.variant, preset=config.preset)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or (value == getattr(defaults, field.name) and field.name not in _ALWAYS_SHOWN):
            continue
        option = f"--{field.name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            words += [option, _text(value)]
    return format_command(*words)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _percent(share: float) -> str:
    return "\N{EN DASH}" if math.isnan(share) else f"{share:.1%}"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*\[<|])", r"\\\1", text)
