"""Warns if test images are training images too: the test accuracy would be too high."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

_SHOWN_AT_MOST = 3

logger = logging.getLogger(__name__)


def warn_of_shared_images(digests: Sequence[bytes], paths: Sequence[Path], *, train_count: int, folder: Path) -> None:
    """Log a warning with the number of test images that have the pixels of a training image, and the first files.

    Args:
        digests: of the pixels of n images, as they are trained and tested: copies in other formats are found too.
        paths: of the n files.
        train_count: how many of them are training images; the others, behind them, are test images.
        folder: that all files are in, for the message.
    """
    rows = list(zip(paths, digests, strict=True))
    training = {digest: path for path, digest in reversed(rows[:train_count])}  # the first file of equal ones
    shared = [(path, training[digest]) for path, digest in rows[train_count:] if digest in training]
    if not shared:
        return
    shown = [f"{test.relative_to(folder)} = {train.relative_to(folder)}" for test, train in shared[:_SHOWN_AT_MOST]]
    logger.warning(
        "%s of the %s test images of %s are training images too, so the test accuracy is too high: %s%s. Keep one "
        "file of each",
        f"{len(shared):,}",
        f"{len(rows) - train_count:,}",
        folder,
        ", ".join(shown),
        f" and {len(shared) - _SHOWN_AT_MOST:,} more" if len(shared) > _SHOWN_AT_MOST else "",
    )
