"""Sources in a Parquet file: a column of encoded images, or of paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from image_formats.files import MAX_FILE_BYTES
from training.batch_prediction.rows import Row, describe_excess
from training.errors import PredictionError

_READ_ROWS = 64  # at once
_BUFFER_BYTES = 1 << 20
_SHOWN_AT_MOST = 20


class Table:
    """A Parquet file.

    Args:
        path: of the file.
        column: of images or paths; None for the only column of bytes or, without one, the only column of text.

    Raises:
        PredictionError: the file is damaged, or there is no such column.
    """

    def __init__(self, path: Path, column: str | None) -> None:
        import pyarrow
        from pyarrow import parquet

        self._path = path
        try:
            # Buffered: otherwise a row group is read at once, which can be the whole file.
            self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except pyarrow.ArrowInvalid as error:
            raise PredictionError(f"{path} is damaged, or not a Parquet file: {error}") from error
        kinds = {field.name: _find_kind(field.type) for field in self._file.schema_arrow}
        self._column = self._choose_column(kinds, column)
        self._is_struct = kinds[self._column] == "struct"
        self.has_paths = kinds[self._column] == "text"
        self.count: int = self._file.metadata.num_rows
        status = path.stat()
        self.fingerprint: dict[str, Any] = {
            "table": path.name,
            "column": self._column,
            "bytes": status.st_size,
            "time": status.st_mtime_ns,
        }

    def read(self, start: int) -> Iterator[Row]:
        """See `Source.read`."""
        for index, value in enumerate(self._read_values(start), start):
            if value is None:
                yield Row(str(index), b"", 0, f"the column {self._column} is null")
            elif len(value) > MAX_FILE_BYTES:
                yield Row(str(index), b"", 0, describe_excess(len(value)))
            else:
                yield Row(str(index), value, len(value))

    def read_paths(self) -> Iterator[str | None]:
        """Yield the paths in a column of text; None where it is null."""
        return self._read_values(0)

    def _read_values(self, start: int) -> Iterator[Any]:
        import pyarrow

        metadata, group = self._file.metadata, 0
        while group < metadata.num_row_groups and start >= metadata.row_group(group).num_rows:
            start -= metadata.row_group(group).num_rows
            group += 1
        groups = range(group, metadata.num_row_groups)
        columns = [self._column + ".bytes" if self._is_struct else self._column]
        try:
            batches = self._file.iter_batches(_READ_ROWS, row_groups=groups, columns=columns, use_threads=False)
            for batch in batches:
                values = batch.column(0)
                skipped, start = min(start, len(values)), max(0, start - len(values))
                for value in values[skipped:]:
                    scalar = value["bytes"] if self._is_struct and value.is_valid else value
                    yield scalar.as_py()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise PredictionError(f"{self._path} is damaged: {error}") from error

    def _choose_column(self, kinds: dict[str, str | None], column: str | None) -> str:
        usable = [name for name, kind in kinds.items() if kind]
        listed = ", ".join(usable[:_SHOWN_AT_MOST]) or "none"
        if column is not None:
            if kinds.get(column):
                return column
            problem = "has no" if column not in kinds else "has neither images nor paths in the"
            raise PredictionError(f"{self._path} {problem} column {column!r}; columns of bytes or text: {listed}")
        candidates = [name for name in usable if kinds[name] != "text"] or usable
        if len(candidates) == 1:
            return candidates[0]
        if not candidates:
            raise PredictionError(f"{self._path} has no column of encoded images (bytes) or of paths (text)")
        raise PredictionError(f"{self._path} has several columns that could have the images: choose --column {listed}")


def _find_kind(kind: Any) -> str | None:
    """Return what a column may have: "bytes", "text" (paths), "struct" (with the field `bytes`) or None."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as Hugging Face writes images
        return "struct" if _find_kind(kind.field("bytes").type) == "bytes" else None
    return None
