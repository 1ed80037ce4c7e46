"""Checks before the first training step of what would make a run fail at its end. Imports no TensorFlow."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from pathlib import Path

from training.config import TrainingConfig
from training.data import Dataset
from training.data.streamed_images import StreamedImages
from training.errors import ExportError, StorageFullError
from training.memory import cache_bytes, checkpoint_bytes, export_bytes, format_bytes, network_bytes, require_memory

_LONGEST_NAME = 200  # bytes; file systems allow 255, some of which hidden files of the export need
_STREAMED_BATCHES = 6 + 4  # upper bound: those of training that wait or are read, and those of evaluation
_MIN_BATCH = 250  # of evaluation
_REPORT_BYTES = 4 * 2**20  # report.md and its plots


def check_model_name(name: str) -> None:
    """Check the name of a model.

    Raises:
        ExportError: the name is invalid; the message suggests a valid one.
    """
    if _is_model_name(name):
        return
    suggestion = re.sub(r"[^\w.-]+", "-", name.encode(errors="ignore").decode()).strip("-._")[:40]
    advice = f"--name {suggestion}" if _is_model_name(suggestion) else "--name NAME"
    raise ExportError(
        f"{name!r} is not a valid model name: it is used in paths and URLs, so it may contain letters, digits, '.', "
        f"'_' and '-', must not start with '.', and has at most {_LONGEST_NAME} bytes. Choose another: {advice}"
    )


def check_models_folder(folder: Path, name: str, *, advice: str = "Choose another with --models-dir") -> None:
    """Check that the model `name` can be written under `folder`, without writing to it.

    Args:
        folder: of all models.
        name: of the model.
        advice: end of the message.

    Raises:
        ExportError: the folder is not writable.
    """
    place = _nearest_existing(folder / name)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ExportError(
            f"the model cannot be exported into {folder / name}: {place} is not a writable folder ({error.strerror}). "
            f"{advice}"
        ) from error


def check_memory(config: TrainingConfig, dataset: Dataset) -> None:
    """Check that training fits into memory. `dataset` is in memory already.

    Raises:
        MemoryTooSmallError: it does not fit; the message has the numbers.
    """
    images = dataset.train.images
    shape, classes = images.shape[1:], len(dataset.class_names)
    # Copied by the split into training and validation images, and by the input pipeline.
    held, kind = 2 * len(images), "training images"
    if isinstance(images, StreamedImages):
        held, kind = min(held, _STREAMED_BATCHES * max(config.batch_size, _MIN_BATCH)), "streamed training images"
    pixels = held * math.prod(shape)
    features = 2 * cache_bytes(config, len(images), shape, classes=classes)
    network = network_bytes(config, shape, classes=classes)
    height, width = shape[:2]
    require_memory(
        pixels + features + network,
        f"{len(images):,} {kind} of {height}x{width} ({format_bytes(pixels)})"
        f"{f', their features ({format_bytes(features)})' if features else ''} and the network with a batch of "
        f"{config.batch_size} ({format_bytes(network)})",
        advice="choose a smaller --image-size or --batch-size"
        + ("" if isinstance(images, StreamedImages) or config.dataset != "folder" else ", or add --stream"),
    )


def check_free_space(config: TrainingConfig, dataset: Dataset, *, run_folder: Path, models_dir: Path | None) -> None:
    """Check the disk space for checkpoints and report, and for the export.

    Args:
        config: of the run.
        dataset: of the run.
        run_folder: the run directory, which may not exist yet.
        models_dir: folder of all models; `None` without an export.

    Raises:
        StorageFullError: there is not enough space; the message has the numbers.
    """
    shape, classes = dataset.train.images.shape[1:], len(dataset.class_names)
    checkpoint = checkpoint_bytes(config, shape, classes=classes)
    existing = sum(path.stat().st_size for path in (run_folder / "checkpoints").rglob("*") if path.is_file())
    # The best, the latest, and a new one before it replaces one of them.
    features = cache_bytes(config, len(dataset.train.labels), shape, classes=classes)
    cached = sum(path.stat().st_size for path in (run_folder / "features").glob("*.npy"))
    needed = {
        run_folder: max(checkpoint, 3 * checkpoint - existing) + max(0, features - cached) + _REPORT_BYTES,
    }
    if models_dir is not None:
        needed[models_dir] = export_bytes(config, shape, classes=classes)
    by_disk: dict[int, int] = {}
    for folder, count in needed.items():
        place = _nearest_existing(folder)
        disk = place.stat().st_dev
        by_disk[disk] = by_disk.get(disk, 0) + count
        free = shutil.disk_usage(place).free
        if free < by_disk[disk]:
            raise StorageFullError(
                f"the run needs about {format_bytes(by_disk[disk])} on the disk of {folder}, and {format_bytes(free)} "
                "are free: free some space, or choose another folder with --run or --models-dir"
            )


def _nearest_existing(path: Path) -> Path:
    while not os.path.lexists(path):
        path = path.parent
    return path


def _is_model_name(name: str) -> bool:
    return bool(re.fullmatch(r"(?!\.)[\w.-]+", name)) and len(name.encode()) <= _LONGEST_NAME
