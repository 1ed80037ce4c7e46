"""SHA-256 sums of an exported version's files, in the format of the command `sha256sum`.

    cd models/<name>/<version> && sha256sum --check assets.extra/SHA256SUMS

TensorFlow checks the contents of variables itself, but not those of `saved_model.pb`, where an export's constants are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUMS_FILE = Path("assets.extra", "SHA256SUMS")


def write_checksums(folder: Path) -> None:
    """Write the sums of all files under a version's folder, by their names relative to it, to `SUMS_FILE`."""
    sums = folder / SUMS_FILE
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != sums:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    sums.write_text("".join(lines))
