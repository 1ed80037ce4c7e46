"""The report of a run: `report.md` and the plots it shows."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.config import TrainingConfig
from training.datasets import Dataset
from training.epochs import EpochResult
from training.evaluation import Evaluation
from training.plots import plot_calibration, plot_confusion, plot_curves, plot_samples
from training.run import RunFolder


def write_report(
    run: RunFolder,
    *,
    config: TrainingConfig,
    dataset: Dataset,
    evaluation: Evaluation,
    probabilities: np.ndarray,
    best: Mapping[str, Any],
) -> Path:
    """Write `report.md` and its plots into the run's folder.

    Args:
        run: the run, whose history is on disk.
        config: what it was asked.
        dataset: what it was trained and judged on.
        evaluation: the test set's figures.
        probabilities: float32 (n, classes), of the test images.
        best: the figures of the epoch whose weights were kept, as `EpochResult` names them.

    Returns:
        The path of `report.md`.
    """
    history = run.read_history()
    epoch = int(best["epoch"])
    plots = {
        "loss": plot_curves(history, figure_name="loss", best_epoch=epoch),
        "accuracy": plot_curves(history, figure_name="accuracy", best_epoch=epoch),
        "confusion": plot_confusion(evaluation.confusion, dataset.class_names),
        "calibration": plot_calibration(evaluation.calibration),
        "samples": plot_samples(dataset.test.images, dataset.test.labels, probabilities, dataset.class_names),
    }
    for name, figure in plots.items():
        run.write_bytes(f"{name}.png", _png(figure))
    run.write_text("report.md", _markdown(config, dataset, evaluation, history, best))
    return run.path / "report.md"


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", pad_inches=0.1)
    return content.getvalue()


def _markdown(
    config: TrainingConfig,
    dataset: Dataset,
    evaluation: Evaluation,
    history: Sequence[EpochResult],
    best: Mapping[str, Any],
) -> str:
    height, width, _ = dataset.train.images.shape[1:]
    summary = (
        f"The `{config.variant}` network, trained by the `{config.loop}` loop on {len(dataset.train.labels):,} images "
        f"of {height}x{width} pixels in {len(dataset.class_names)} classes ({dataset.source}), a tenth of them held "
        f"out for validation. Judged on the test set, with the weights of epoch {best['epoch']}, whose validation "
        "loss was the lowest."
    )
    return "\n".join(
        [
            f"# {dataset.name}: {evaluation.accuracy:.2%} of {evaluation.count:,} test images",
            "",
            summary,
            "",
            *_table(
                ("", "loss", "accuracy"),
                (
                    ("training, during the epoch", f"{best['loss']:.4f}", f"{best['accuracy']:.2%}"),
                    ("validation", f"{best['val_loss']:.4f}", f"{best['val_accuracy']:.2%}"),
                    ("**test**", f"**{evaluation.loss:.4f}**", f"**{evaluation.accuracy:.2%}**"),
                ),
            ),
            "",
            "```",
            _command(config),
            "```",
            "",
            "![Loss by epoch](loss.png) ![Accuracy by epoch](accuracy.png)",
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
            f"Expected calibration error {evaluation.calibration.expected_calibration_error:.4f}, in 15 bins.",
            "",
            "![Accuracy by confidence](calibration.png)",
            "",
            "## Samples",
            "",
            "![Right predictions and confident mistakes](samples.png)",
            "",
            "## Epochs",
            "",
            *_table(
                ("epoch", "loss", "accuracy", "val loss", "val accuracy", "learning rate", "images/s", "seconds"),
                (
                    (
                        f"{result.epoch}{' (kept)' if result.epoch == best['epoch'] else ''}",
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


def _command(config: TrainingConfig) -> str:
    """Return the command line that asks for this run again."""
    words = ["python -m training train"]
    defaults = TrainingConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(defaults, field.name) and field.name not in ("dataset", "variant", "loop", "seed"):
            continue
        option = f"--{field.name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words.append(f"{option} {value[0]}x{value[1]}")
        else:
            words.append(f"{option} {value}")
    return " ".join(words)


def _percent(share: float) -> str:
    return "\N{EN DASH}" if math.isnan(share) else f"{share:.1%}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
