"""What would make a run fail at its end is checked before its first training step.

Imports no TensorFlow.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from training.config import TrainingConfig
from training.data import Dataset
from training.errors import ExportError, StorageFullError
from training.memory import checkpoint_bytes, export_bytes, format_bytes, network_bytes, require_memory

_LONGEST_NAME = 200  # bytes; file systems allow 255, and hidden files beside the model need some
_REPORT_BYTES = 4 * 2**20  # report.md and its plots


def check_model_name(name: str) -> None:
    """Check that a model can be called `name`.

    Raises:
        ExportError: it cannot; the message suggests a name that is possible.
    """
    if _is_model_name(name):
        return
    suggestion = re.sub(r"[^\w.-]+", "-", name.encode(errors="ignore").decode()).strip("-._")[:40]
    advice = f"--name {suggestion}" if _is_model_name(suggestion) else "--name NAME"
    raise ExportError(
        f"{name!r} cannot be a model's name: it becomes a folder and part of an address, so use letters, digits, "
        f"'.', '_' and '-', no '.' at the start, and at most {_LONGEST_NAME} bytes. Choose one, such as {advice}"
    )


def check_models_folder(folder: Path, name: str) -> None:
    """Check that a version of the model `name` can be written under `folder`, without leaving anything there.

    Raises:
        ExportError: it cannot.
    """
    place = _nearest_existing(folder / name)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ExportError(
            f"the model cannot be exported into {folder / name}: {place} is not a folder that can be written to "
            f"({error.strerror}). Choose another with --models-dir, or train with --no-export"
        ) from error


def check_memory(config: TrainingConfig, dataset: Dataset) -> None:
    """Check that training `config` on `dataset`, which is in memory already, fits into what memory is left.

    Raises:
        MemoryTooSmallError: it does not; the message has the numbers.
    """
    images = dataset.train.images
    # The split into training and validation images copies them, and so does the input pipeline.
    copies = 2 * images.nbytes
    network = network_bytes(config, images.shape[1:], classes=len(dataset.class_names))
    height, width = images.shape[1:3]
    require_memory(
        copies + network,
        f"{len(images):,} training images of {height}x{width} ({format_bytes(copies)}) and the network with a batch of "
        f"{config.batch_size} ({format_bytes(network)})",
        advice="choose a smaller --image-size or --batch-size",
    )


def check_free_space(config: TrainingConfig, dataset: Dataset, *, run_folder: Path, models_dir: Path | None) -> None:
    """Check that the disk has room for a run's checkpoints and report, and for the export.

    Args:
        config: of the run.
        dataset: what it is trained on.
        run_folder: the run's folder; it need not exist yet.
        models_dir: where the model will be exported; `None` if it will not.

    Raises:
        StorageFullError: there is not enough room; the message has the numbers.
    """
    shape, classes = dataset.train.images.shape[1:], len(dataset.class_names)
    checkpoint = checkpoint_bytes(config, shape, classes=classes)
    existing = sum(path.stat().st_size for path in (run_folder / "checkpoints").rglob("*") if path.is_file())
    # The best, the latest, and the one that is written before it replaces one of them.
    needed = {run_folder: max(checkpoint, 3 * checkpoint - existing) + _REPORT_BYTES}
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
                f"about {format_bytes(by_disk[disk])} will be written to the disk of {folder}, and "
                f"{format_bytes(free)} are free: free some space, or choose another folder with --run or --models-dir"
            )


def _nearest_existing(path: Path) -> Path:
    while not os.path.lexists(path):
        path = path.parent
    return path


def _is_model_name(name: str) -> bool:
    return (
        bool(name)
        and not name.startswith(".")
        and all(c.isalnum() or c in "._-" for c in name)
        and len(name.encode()) <= _LONGEST_NAME
    )
