"""Version numbers of exported models. They only grow, and a version is published atomically."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from training.errors import ExportError
from training.storage import sync

MAX_VERSION = 2**63 - 1  # an int64 in TensorFlow Serving's protocol


@contextlib.contextmanager
def next_version(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the next version number of a model and a hidden folder to write it to; rename the folder at the end.

    Nothing is published if the body raises.

    Raises:
        ExportError: the largest version number is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".last_version").open("a+") as counter:
        # One export at a time, so any partial folder was left by a killed one.
        fcntl.flock(counter, fcntl.LOCK_EX)
        for abandoned in folder.glob(".*.partial"):
            shutil.rmtree(abandoned)
        # The file remembers deleted versions: a number is never used twice.
        counter.seek(0)
        version = max(_version_numbers(counter.read().strip(), *(path.name for path in folder.iterdir()))) + 1
        if version > MAX_VERSION:
            raise ExportError(
                f"{folder} has version {MAX_VERSION}, the largest possible, so no newer one can be exported: rename "
                "it, or export with another --name"
            )
        partial = folder / f".{version}.partial"
        try:
            yield version, partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            counter.truncate(0)
            counter.write(f"{version}\n")
            counter.flush()
            os.fsync(counter.fileno())
            partial.rename(folder / str(version))
            sync(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def find_version(model: Path) -> Path:
    """Return the folder of a version: `model` itself, or the newest version in it.

    Raises:
        ExportError: `model` is neither a version nor a folder of versions.
    """
    model = model.resolve()
    if _is_version(model):
        return model
    versions = [path for path in model.glob("*") if path.name.isascii() and path.name.isdigit() and _is_version(path)]
    if not versions:
        reason = "neither it nor a version in it has a saved_model.pb" if model.is_dir() else "it does not exist"
        raise ExportError(
            f"{model} is not an exported model: {reason}. Name a model, models/NAME, or a version, models/NAME/VERSION"
        )
    return max(versions, key=lambda path: int(path.name))


def _is_version(folder: Path) -> bool:
    return (folder / "saved_model.pb").is_file()


def _version_numbers(*names: str) -> list[int]:
    """Return 0 and the version numbers among `names`. Servers ignore numbers over MAX_VERSION."""
    digits = (name for name in names if name.isascii() and name.isdigit())
    return [0, *(number for number in map(int, digits) if number <= MAX_VERSION)]
