"""Finished parts of a result, in a folder beside it, from which an interrupted prediction continues.

OUT.parts/manifest.json      what is predicted: model, source, options
OUT.parts/part-ROW.parquet   rows from number ROW on, complete: written under another name, synced, renamed
OUT.parts/listing            see `training.batch_prediction.listing`
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from training.errors import PredictionError
from training.storage import explain_full_storage, make_folder, sync, write_file

if TYPE_CHECKING:
    import pyarrow

MAX_ROW_GROUP = 1 << 16  # rows in a row group of the result
MAX_ROW_GROUP_VALUES = 1 << 22  # probabilities in a row group
_ADVICE = "The finished parts are kept: free some space, then run the same command again"


class Parts:
    """The parts of one result. As a context manager, it lets no other process write the same result.

    Args:
        out: the file of the result.

    Attributes:
        done: the number of rows, from the first one of the source, in finished parts.

    Raises:
        PredictionError: another process writes this result, or the folder cannot be written to.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._folder = out.with_name(f"{out.name}.parts")
        self._manifest = self._folder / "manifest.json"
        self.listing = self._folder / "listing"
        self.done = 0
        try:
            with self.explain_full():
                make_folder(self._folder)
                self._lock = (self._folder / "lock").open("wb")
        except OSError as error:
            raise PredictionError(f"cannot write {out}: {error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except OSError as error:
            self._lock.close()
            raise PredictionError(f"another process is writing {out}: wait for it, or choose another file") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not any(self._folder.glob("part-*")):  # nothing to continue from
            self.remove()
        self._lock.close()

    def open(self, manifest: dict[str, Any], *, restart: bool) -> None:
        """Find the finished parts of the prediction that `manifest` describes, a JSON object.

        Args:
            manifest: by name, for the error message, what the result depends on.
            restart: discard the finished parts.

        Raises:
            PredictionError: the parts are of another prediction.
        """
        before = None if restart else self._read_manifest()
        if before is None:
            for path in self._folder.glob("part-*"):
                path.unlink()
            with self.explain_full():
                write_file(self._manifest, json.dumps(manifest, indent=2).encode())
            return
        if changed := [name for name in manifest if before.get(name) != manifest[name]]:
            details = "; ".join(f"{name}: was {before.get(name)}, is {manifest[name]}" for name in changed)
            raise PredictionError(
                f"{self._folder} has finished parts of another prediction ({details}). Add --restart to discard them, "
                "or choose another --out"
            )
        self.done = sum(rows for _, rows in self._iterate())

    def write(self, batches: Sequence[pyarrow.RecordBatch]) -> None:
        """Write the next part; it is complete and durable afterwards."""
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_batches(batches)
        content = io.BytesIO()
        parquet.write_table(table, content)
        with self.explain_full():
            write_file(self._folder / f"part-{self.done:012}.parquet", content.getvalue())
        self.done += len(table)

    def merge(self, schema: pyarrow.Schema, *, classes: int) -> None:
        """Write the result from all parts, durably and atomically, and remove them.

        Its bytes do not depend on how the rows were divided into parts.
        """
        from pyarrow import parquet

        rows = max(1, min(MAX_ROW_GROUP, MAX_ROW_GROUP_VALUES // classes))
        merged = self._folder / "merged"
        with self.explain_full():
            with merged.open("wb") as file:
                with parquet.ParquetWriter(file, schema) as writer:
                    for table in self._regroup(rows):
                        writer.write_table(table, row_group_size=rows)
                file.flush()
                os.fsync(file.fileno())
            merged.replace(self._out)
            sync(self._out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        self._manifest.unlink(missing_ok=True)  # first: without it, parts are discarded
        shutil.rmtree(self._folder, ignore_errors=True)

    def _regroup(self, rows: int) -> Iterator[pyarrow.Table]:
        """Yield all rows in tables of `rows` rows, the last one shorter, each in one piece of memory."""
        import pyarrow
        from pyarrow import parquet

        waiting: list[pyarrow.Table] = []
        count = 0
        for path, _ in self._iterate():
            waiting.append(parquet.read_table(path, partitioning=None))
            count += len(waiting[-1])
            while count >= rows:
                table = pyarrow.concat_tables(waiting)
                yield table.slice(0, rows).combine_chunks()
                waiting, count = [table.slice(rows)], count - rows
        if count:
            yield pyarrow.concat_tables(waiting).combine_chunks()

    def _iterate(self) -> Iterator[tuple[Path, int]]:
        """Yield the finished parts and their numbers of rows, as far as no row is missing."""
        import pyarrow
        from pyarrow import parquet

        first = 0
        while (path := self._folder / f"part-{first:012}.parquet").exists():
            try:
                count: int = parquet.read_metadata(path).num_rows
            except (pyarrow.ArrowInvalid, OSError):  # damaged by other means than this program
                return
            yield path, count
            first += count

    def _read_manifest(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads(self._manifest.read_text())
            return manifest if isinstance(manifest, dict) else None
        return None

    def explain_full(self) -> contextlib.AbstractContextManager[None]:
        """Convert errors of a full disk to a `StorageFullError` that says how to continue."""
        return explain_full_storage(self._out, _ADVICE)
