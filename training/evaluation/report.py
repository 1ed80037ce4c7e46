"""The report of a run: `report.md` and the plots it shows."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.callbacks import EpochResult
from training.config import TrainingConfig
from training.data import Dataset
from training.evaluation.metrics import CALIBRATION_BINS, Calibration, Evaluation
from training.evaluation.plots import plot_calibration, plot_confusion, plot_curves, render_png
from training.evaluation.sample_sheet import plot_samples
from training.run_dir import RunDir
from training.shell_command import format_command

# In the command, even where they are the default.
_ALWAYS_SHOWN = ("dataset", "variant", "preset", "loop", "dtype", "epochs", "seed")


def write_report(
    run: RunDir,
    *,
    config: TrainingConfig,
    dataset: Dataset,
    evaluation: Evaluation,
    mirrored: Evaluation | None,
    uncalibrated: Calibration,
    temperature: float,
    probabilities: np.ndarray,
    best: Mapping[str, Any],
) -> Path:
    """Write `report.md` and its plots into the run's folder.

    Args:
        run: the run, whose history is on disk.
        config: what it was asked.
        dataset: what it was trained and judged on.
        evaluation: the test set's figures.
        mirrored: the same with mirror averaging, where that was asked for.
        uncalibrated: as the model was before its logits were divided by the temperature.
        temperature: what they are divided by.
        probabilities: float32 (n, classes), of the test images.
        best: the figures of the epoch whose weights were kept, as `EpochResult` names them.

    Returns:
        The path of `report.md`.
    """
    # A run killed between saving its best checkpoint and its history has a best epoch that the history lacks.
    kept = EpochResult(**best)
    by_epoch = {result.epoch: result for result in (*run.read_history(), kept)}
    history = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    plots = {
        "loss": plot_curves(history, quantity="loss", best_epoch=kept.epoch),
        "accuracy": plot_curves(history, quantity="accuracy", best_epoch=kept.epoch),
        "confusion": plot_confusion(evaluation.confusion, dataset.class_names),
        "calibration": plot_calibration(uncalibrated, evaluation.calibration, temperature=temperature),
        "samples": plot_samples(dataset.test.images, dataset.test.labels, probabilities, dataset.class_names),
    }
    confidence = (
        f"The logits are divided by a temperature of {temperature:.3f}, fitted on the validation images; the exported "
        f"model does the same. Expected calibration error {uncalibrated.expected_calibration_error:.4f} before, "
        f"{evaluation.calibration.expected_calibration_error:.4f} after: how far confidence and accuracy lie apart in "
        f"{CALIBRATION_BINS} bins, averaged over the images."
    )
    for name, figure in plots.items():
        run.write_bytes(f"{name}.png", render_png(figure))
    run.write_text("report.md", _markdown(config, dataset, evaluation, mirrored, confidence, history, kept))
    return run.path / "report.md"


def _markdown(
    config: TrainingConfig,
    dataset: Dataset,
    evaluation: Evaluation,
    mirrored: Evaluation | None,
    confidence: str,
    history: Sequence[EpochResult],
    kept: EpochResult,
) -> str:
    height, width, _ = dataset.train.images.shape[1:]
    summary = (
        f"The `{config.variant}` network, trained by the `{config.loop}` loop on {len(dataset.train.labels):,} images "
        f"of {height}x{width} pixels in {len(dataset.class_names)} classes ({_escape(dataset.source)}), a tenth of "
        f"them held out for validation. Judged on the test set, with the weights of epoch {kept.epoch}, whose "
        "validation loss was the lowest."
    )
    curves = "The circle marks the epoch that was kept; a dashed line, that the learning rate (lr) was lowered."
    return "\n".join(
        [
            f"# {_escape(dataset.name)}: {evaluation.accuracy:.2%} of {evaluation.count:,} test images",
            "",
            summary,
            "",
            *_table(
                ("", "loss", "accuracy"),
                (
                    ("training, during the epoch", f"{kept.loss:.4f}", f"{kept.accuracy:.2%}"),
                    ("validation", f"{kept.val_loss:.4f}", f"{kept.val_accuracy:.2%}"),
                    ("**test**", f"**{evaluation.loss:.4f}**", f"**{evaluation.accuracy:.2%}**"),
                    *(
                        []
                        if mirrored is None
                        else [
                            (
                                "test, averaged with the mirror images",
                                f"{mirrored.loss:.4f}",
                                f"{mirrored.accuracy:.2%}",
                            )
                        ]
                    ),
                ),
            ),
            "",
            "To train it again:",
            "",
            "```sh",
            _command(config),
            "```",
            "",
            "![Loss by epoch](loss.png) ![Accuracy by epoch](accuracy.png)",
            "",
            curves,
            "",
            "## By class",
            "",
            *_table(
                ("class", "precision", "recall", "F1", "images"),
                (
                    (_escape(c.name), _percent(c.precision), _percent(c.recall), _percent(c.f1), f"{c.support:,}")
                    for c in evaluation.per_class
                ),
            ),
            "",
            "![Confusion matrix](confusion.png)",
            "",
            "## Confidence",
            "",
            confidence,
            "",
            "![Accuracy by confidence](calibration.png)",
            "",
            "## Samples",
            "",
            "![Right predictions and confident mistakes](samples.png)",
            "",
            "## Configuration",
            "",
            *_table(("setting", "value"), _settings(config, dataset)),
            "",
            "## Epochs",
            "",
            *_table(
                ("epoch", "loss", "accuracy", "val loss", "val accuracy", "learning rate", "images/s", "seconds"),
                (
                    (
                        f"{result.epoch}{' (kept)' if result.epoch == kept.epoch else ''}",
                        f"{result.loss:.4f}",
                        f"{result.accuracy:.2%}",
                        f"{result.val_loss:.4f}",
                        f"{result.val_accuracy:.2%}",
                        f"{result.learning_rate:.3g}",
                        f"{result.images_per_s:,.0f}",
                        f"{result.seconds:.1f}",
                    )
                    for result in history
                ),
            ),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    alignment = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, alignment, *rows)]


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
    """Return the command line that asks for this run again."""
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
