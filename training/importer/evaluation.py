"""Evaluates an imported model on labelled images: calibration on one part, metrics and report on the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data import Dataset, Split
from training.data.image_folder import find_image_folders, has_splits, load_image_folder
from training.errors import ModelError
from training.evaluation.calibration import apply_temperature, fit_temperature
from training.evaluation.guard_evaluation import GuardEvaluation
from training.evaluation.metrics import CalibratedEvaluation, evaluate
from training.evaluation.report import Origin, escape, make_table, write_model_report
from training.importer.choice import Candidate, table_rows
from training.run_dir import RunDir, make_numbered

_SEED = 0
_TEST_FRACTION = 0.5
_CHOICE_IMAGES = 500  # at most; a few hundred separate the scales


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images of the model's size.

    Attributes:
        dataset: with the model's labels; its test images are evaluated, its training images are not unless they are
            `calibration`.
        calibration: images that the input scale is chosen and the temperature fitted on.
    """

    dataset: Dataset
    calibration: Split

    def choice_part(self) -> Split:
        """Return the images that the input scale is chosen on, a random part of `calibration`."""
        count = len(self.calibration.labels)
        rows = np.sort(np.random.default_rng(_SEED).permutation(count)[:_CHOICE_IMAGES])
        return Split(self.calibration.images[rows], self.calibration.labels[rows])


def load_images(
    folder: Path, *, image_size: tuple[int, int], labels: tuple[str, ...] | None, classes: int
) -> LabelledImages:
    """Load an image folder at a model's size.

    Half of each class is for calibration and half for the test. If there are folders `train/` and `test/`, only `test/`
    is halved: the model was probably trained on `train/`, and a temperature fitted there would be too low.

    Args:
        folder: with a folder for each class, or with `train/` and `test/`.
        image_size: (height, width) to resize to.
        labels: of the model, in the order of its outputs; by default the folder's class names, sorted.
        classes: of the model.

    Raises:
        DatasetError: the data is missing, damaged or too small.
        ModelError: the classes are not the model's.
    """
    dataset = load_image_folder(folder, image_size=image_size, seed=_SEED, test_fraction=_TEST_FRACTION)
    dataset = _relabel(dataset, labels, classes, folder)
    if not has_splits(find_image_folders(folder)[0]):
        return LabelledImages(dataset, dataset.train)
    counts = np.bincount(dataset.test.labels)
    if (counts == 1).any():
        raise ModelError(
            f"the test images of {folder} have a single image of {dataset.class_names[counts.tolist().index(1)]!r}; at "
            "least 2 of each class are needed, one to calibrate and one to test"
        )
    calibration, test = dataset.test.split_off(_TEST_FRACTION, seed=_SEED)
    return LabelledImages(Dataset(dataset.name, dataset.source, dataset.class_names, dataset.train, test), calibration)


def _relabel(dataset: Dataset, labels: tuple[str, ...] | None, classes: int, folder: Path) -> Dataset:
    """Return a dataset whose labels are the model's class ids."""
    names = dataset.class_names
    if labels is None:
        if len(names) != classes:
            raise ModelError(
                f"the model has {classes} classes, and {folder} has {len(names)}: {_listed(names)}. Give the model's "
                "labels in the order of its outputs: --labels"
            )
        return dataset
    if unknown := [name for name in names if name not in labels]:
        raise ModelError(
            f"{folder} has the classes {_listed(unknown)}, which are not among the {len(labels)} labels, "
            f"{_listed(labels)}. Rename the folders, or correct --labels"
        )
    class_ids = np.array([labels.index(name) for name in names], np.int64)
    train, test = (Split(split.images, class_ids[split.labels]) for split in (dataset.train, dataset.test))
    return Dataset(dataset.name, dataset.source, labels, train, test)


def calibrate_and_evaluate(images: LabelledImages, predict: Callable[[np.ndarray], np.ndarray]) -> CalibratedEvaluation:
    """Fit the temperature on the calibration images, and evaluate on the test images.

    Args:
        images: labelled images.
        predict: returns the probabilities, float32 (n, classes), of uint8 images, without a temperature.
    """
    calibration, test, names = images.calibration, images.dataset.test, images.dataset.class_names
    temperature = fit_temperature(predict(calibration.images), calibration.labels)
    uncalibrated = predict(test.images)
    probabilities = apply_temperature(uncalibrated, temperature)
    return CalibratedEvaluation(
        evaluation=evaluate(probabilities, test.labels, names),
        uncalibrated=evaluate(uncalibrated, test.labels, names).calibration,
        temperature=temperature,
        probabilities=probabilities,
    )


def describe_evaluation(images: LabelledImages, test: CalibratedEvaluation) -> dict[str, Any]:
    """Return the fields of model.json about the data and the metrics."""
    dataset, evaluation = images.dataset, test.evaluation
    return {
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "calibration_images": len(images.calibration.labels),
            "test_images": len(dataset.test.labels),
            "content_hash": dataset.content_hash,
        },
        "test": {"loss": evaluation.loss, "accuracy": evaluation.accuracy},
        "temperature": test.temperature,
        "calibration": evaluation.calibration.to_json(),
        "uncalibrated_error": test.uncalibrated.expected_calibration_error,
    }


def write_import_report(
    images: LabelledImages,
    test: CalibratedEvaluation,
    *,
    name: str,
    settings: Mapping[str, str],
    candidates: Sequence[Candidate],
    limits: GuardEvaluation,
) -> Path:
    """Write the report of an imported model into a new directory `runs/import-NAME`.

    Args:
        images: the labelled images.
        test: the evaluation.
        name: of the model.
        settings: what was given or inferred, by its name.
        candidates: input scales that were evaluated, if one was chosen.
        limits: evaluation of the guarded signatures.

    Returns:
        The path of `report.md`.

    Raises:
        RunError: the directory cannot be created.
    """
    calibration, dataset = images.calibration, images.dataset
    height, width, _ = dataset.test.images.shape[1:]
    details = ""
    if candidates:
        table = make_table(("input scale", "accuracy", "loss"), table_rows(candidates))
        count = min(_CHOICE_IMAGES, len(calibration.labels))
        details = f"## Input scale\n\nThe first is used; evaluated on {count:,} images for calibration.\n\n{table}\n"
    origin = Origin(
        title=name,
        introduction=f"Imported from {escape(settings['source'])}, and evaluated on images of {height}x{width} pixels "
        f"in {len(dataset.class_names)} classes ({escape(dataset.source)}).",
        calibrated_on=f"{len(calibration.labels):,} other images",
        details=details,
        settings=[
            *((setting, escape(value)) for setting, value in settings.items()),
            ("calibration images", f"{len(calibration.labels):,}"),
        ],
    )
    run = RunDir(make_numbered(Path("runs") / f"import-{name}"))
    run.write_evaluation({"test": {**test.to_json(), **limits.to_json()}})
    return write_model_report(run, origin, dataset=dataset, test=test, guard=limits)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
