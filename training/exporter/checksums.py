"""SHA-256 checksums of the files of an exported version, in the format of the command `sha256sum`.

    cd models/<name>/<version> && sha256sum --check assets.extra/SHA256SUMS

TensorFlow verifies the contents of variables, but not of `saved_model.pb`, which contains an export's constants.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUMS_FILE = Path("assets.extra", "SHA256SUMS")


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files under a version's folder, by relative path, to `SUMS_FILE`."""
    (folder / SUMS_FILE).write_text("".join(compute_checksums(folder)))


def compute_checksums(folder: Path) -> list[str]:
    """Return the lines of `SUMS_FILE`, sorted by path, of the files that a version has now."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / SUMS_FILE:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return lines
