"""Warns if test images are training images too: the test accuracy would be too high."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_SHOWN_AT_MOST = 3

logger = logging.getLogger(__name__)


def warn_of_shared_images(images: np.ndarray, paths: Sequence[Path], *, is_test: np.ndarray, folder: Path) -> None:
    """Log a warning with the number of test images that have the pixels of a training image, and the first files.

    Args:
        images: uint8 (n, height, width, 3), as they are trained and tested: copies in other formats are found too.
        paths: of the n files.
        is_test: bool (n,), whether an image is a test image; the others are training images.
        folder: that all files are in, for the message.
    """
    hashes = [hashlib.sha256(image.data).digest() for image in images]
    rows = list(zip(paths, hashes, is_test.tolist(), strict=True))
    training = {digest: path for path, digest, tests in reversed(rows) if not tests}  # the first file of equal ones
    shared = [(path, training[digest]) for path, digest, tests in rows if tests and digest in training]
    if not shared:
        return
    shown = [f"{test.relative_to(folder)} = {train.relative_to(folder)}" for test, train in shared[:_SHOWN_AT_MOST]]
    logger.warning(
        "%s of the %s test images of %s are training images too, so the test accuracy is too high: %s%s. Keep one "
        "file of each",
        f"{len(shared):,}",
        f"{np.count_nonzero(is_test):,}",
        folder,
        ", ".join(shown),
        f" and {len(shared) - _SHOWN_AT_MOST:,} more" if len(shared) > _SHOWN_AT_MOST else "",
    )
