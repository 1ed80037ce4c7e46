"""Finds out what kind of source was named, and opens it."""

from __future__ import annotations

import glob
import os
import tarfile
from pathlib import Path

from image_formats.content import EXPECTED
from image_formats.files import is_image_file
from training.batch_prediction.archive import Archive
from training.batch_prediction.listing import Listing, find_images, match_files, read_list
from training.batch_prediction.rows import Source
from training.batch_prediction.table import Table
from training.data.file_kind import describe_foreign_file
from training.errors import PredictionError
from training.storage import is_full

_PARQUET = b"PAR1"
_KINDS = "a folder, a pattern such as 'photos/*.jpg', a list of paths (.txt), a tar archive or a Parquet file"


def open_source(name: str, *, column: str | None, listing: Path) -> Source:
    """Open a source.

    Args:
        name: a folder, an image, a pattern, a list (.txt), a tar archive or a Parquet file.
        column: of a Parquet file.
        listing: where the paths of its files are written to, if it has files.

    Raises:
        PredictionError: there is no such source, it is none of these, damaged, or has no images.
    """
    try:
        source = _open(name, column, listing)
    except FileNotFoundError as error:
        raise PredictionError(f"{name} does not exist; expected {_KINDS}") from error
    except OSError as error:
        if is_full(error):  # the disk of the listing
            raise
        raise PredictionError(f"{error.filename or name} cannot be read: {error.strerror or error}") from error
    if not source.count:
        raise PredictionError(f"{name} has no images: {_explain_empty(name)}")
    return source


def _open(name: str, column: str | None, listing: Path) -> Source:
    path = Path(name)
    is_parquet = path.is_file() and _read_head(path) == _PARQUET
    if column is not None and not is_parquet:
        raise PredictionError(f"--column is for Parquet files, and {name} is none: leave it out")
    if not path.exists():
        if glob.has_magic(name):
            return Listing(match_files(name), listing)
        raise FileNotFoundError(name)
    if path.is_dir():
        return Listing(find_images(name), listing)
    if is_parquet:
        table = Table(path, column)
        return Listing(table.read_paths(), listing) if table.has_paths else table
    if path.suffix.lower() == ".txt":
        return Listing(read_list(path), listing)
    if is_image_file(path):
        return Listing([name], listing)
    if path.is_file() and tarfile.is_tarfile(path):
        return Archive(path)
    raise PredictionError(f"{name} {describe_foreign_file(path) or 'is of no known kind'}; expected {_KINDS}")


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_PARQUET))


def _explain_empty(name: str) -> str:
    if os.path.isdir(name):  # noqa: PTH112
        return f"no file in it or below is an image; {EXPECTED}"
    if not Path(name).exists():
        return "no file matches the pattern"
    return "it is empty" if Path(name).suffix.lower() == ".txt" else f"nothing in it is an image; {EXPECTED}"
