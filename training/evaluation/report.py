"""The report of a model: `report.md` and its plots.

`write_report` is for a training run. `write_model_report` is for any evaluated model, also an imported one, which has
no history: what only one kind of model has is its `Origin`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

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


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from: the parts of its report besides the evaluation.

    Attributes:
        title: name of the run's data or of the model.
        introduction: a paragraph of Markdown.
        calibrated_on: the images that the temperature was fitted on, such as "the validation images".
        earlier: rows (images, loss, accuracy) of the results above the test images.
        later: rows below them.
        details: Markdown between the results and the metrics by class.
        settings: rows (name, value) of the configuration, without those of the test images.
        appendix: Markdown at the end.
        plots: figures that `details` and `appendix` show, by name.
    """

    title: str
    introduction: str
    calibrated_on: str
    earlier: Sequence[Sequence[str]] = ()
    later: Sequence[Sequence[str]] = ()
    details: str = ""
    settings: Sequence[Sequence[str]] = ()
    appendix: str = ""
    plots: Mapping[str, Figure] = field(default_factory=dict)


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
    origin = _describe_run(config, dataset, mirrored, history, best)
    return write_model_report(run, origin, dataset=dataset, test=test, guard=guard)


def write_model_report(
    run: RunDir,
    origin: Origin,
    *,
    dataset: Dataset,
    test: CalibratedEvaluation,
    guard: GuardEvaluation | None = None,
) -> Path:
    """Write `report.md` and its plots.

    Args:
        run: its directory receives the files; it needs no other contents.
        origin: of the model.
        dataset: with the test images.
        test: evaluation on the test images.
        guard: evaluation of the guarded signatures, for a section of its own.

    Returns:
        The path of `report.md`.
    """
    evaluation, names = test.evaluation, dataset.class_names
    plots = {
        **origin.plots,
        "confusion": plot_confusion(evaluation.confusion, names),
        "calibration": plot_calibration(test.uncalibrated, evaluation.calibration, temperature=test.temperature),
        "samples": plot_samples(dataset.test.images, dataset.test.labels, test.probabilities, names),
    }
    if guard:
        plots["typicality"] = plot_roc(guard)
        plots["atypical"] = plot_atypical(dataset, guard, test.probabilities)
    return run.write_report(
        _markdown(origin, dataset, test, limits=describe_guard(guard) if guard else ""),
        {name: render_png(figure) for name, figure in plots.items()},
    )


def _describe_run(
    config: TrainingConfig,
    dataset: Dataset,
    mirrored: CalibratedEvaluation | None,
    history: Sequence[EpochResult],
    best: EpochResult,
) -> Origin:
    height, width, _ = dataset.train.images.shape[1:]
    later = []
    if mirrored:
        loss, accuracy = mirrored.evaluation.loss, mirrored.evaluation.accuracy
        later.append(("test, with horizontal-flip TTA", f"{loss:.4f}", f"{accuracy:.2%}"))
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
    return Origin(
        title=dataset.name,
        introduction=f"""The `{config.variant}` network, trained with the `{config.loop}` loop on \
{len(dataset.train.labels):,} images of {height}x{width} pixels in {len(dataset.class_names)} classes \
({escape(dataset.source)}); a tenth of them is the validation split. Evaluated on the test images with the weights of \
epoch {best.epoch}, which had the lowest validation loss.""",
        calibrated_on="the validation images",
        earlier=[
            ("training, during the epoch", f"{best.loss:.4f}", f"{best.accuracy:.2%}"),
            ("validation", f"{best.val_loss:.4f}", f"{best.val_accuracy:.2%}"),
        ],
        later=later,
        details=f"""Train it again:

```sh
{_command(config)}
```

![Loss by epoch](loss.png) ![Accuracy by epoch](accuracy.png)

The circle marks the epoch whose weights are kept; dashed lines mark reductions of the learning rate.
""",
        settings=[*_settings(config), ("training images", f"{len(dataset.train.labels):,}")],
        appendix=f"## Epochs\n\n{make_table(_EPOCH_COLUMNS, epochs)}\n",
        plots={
            "loss": plot_curves(history, quantity="loss", best_epoch=best.epoch),
            "accuracy": plot_curves(history, quantity="accuracy", best_epoch=best.epoch),
        },
    )


def _markdown(origin: Origin, dataset: Dataset, test: CalibratedEvaluation, *, limits: str) -> str:
    evaluation = test.evaluation
    results = [
        *origin.earlier,
        ("**test**", f"**{evaluation.loss:.4f}**", f"**{evaluation.accuracy:.2%}**"),
        *origin.later,
    ]
    classes = (
        (escape(c.name), _percent(c.precision), _percent(c.recall), _percent(c.f1), f"{c.support:,}")
        for c in evaluation.per_class
    )
    settings = (
        *origin.settings,
        ("test images", f"{len(dataset.test.labels):,}"),
        ("content hash of the data", f"`{dataset.content_hash}`"),
    )
    return f"""# {escape(origin.title)}: {evaluation.accuracy:.2%} of {evaluation.count:,} test images

{origin.introduction}

{make_table(("", "loss", "accuracy"), results)}

{origin.details}
## By class

{make_table(("class", "precision", "recall", "F1", "images"), classes)}

![Confusion matrix](confusion.png)

## Confidence

The logits are divided by a temperature of {test.temperature:.3f}, fitted on {origin.calibrated_on}, in the exported \
model too. Expected calibration error: {test.uncalibrated.expected_calibration_error:.4f} before, \
{evaluation.calibration.expected_calibration_error:.4f} after. It is the mean absolute difference of confidence and \
accuracy in {CALIBRATION_BINS} bins, weighted by their images.

![Accuracy by confidence](calibration.png)

## Samples

![Correct predictions and confident errors](samples.png)

{limits}
## Configuration

{make_table(("setting", "value"), settings)}

{origin.appendix}"""


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; its first column is aligned left, the others right."""
    alignment = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, alignment, *rows))


def _settings(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        yield setting.name.replace("_", " "), escape(_text(value)) if value is not None else "\N{EN DASH}"


def _command(config: TrainingConfig) -> str:
    """Return the command that repeats this run."""
    words = ["train"]
    defaults = TrainingConfig.fill_in(variant=config.variant, preset=config.preset)
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if value is None or (value == getattr(defaults, setting.name) and setting.name not in _ALWAYS_SHOWN):
            continue
        option = f"--{setting.name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            words += [option, _text(value)]
    return format_command(*words)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _percent(share: float) -> str:
    return "\N{EN DASH}" if math.isnan(share) else f"{share:.1%}"


def escape(text: str) -> str:
    """Escape what Markdown would format in a text."""
    return re.sub(r"([\\`*\[<|])", r"\\\1", text)
