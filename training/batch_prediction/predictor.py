"""Predicts a batch of rows: reads and decodes the images, classifies them, and arranges the result as columns.

The pixels are those of the service and of the exported model: opaque PNG files of the model's own size are left to the
model, which decodes them outside the interpreter's lock; `image_formats` decodes all others.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from image_formats import png
from image_formats.decoding import read_rgb
from image_formats.header import UnreadableImage
from training.batch_prediction.classifier import GUARD_OUTPUTS, Classifier, InvalidFilesError, Outputs, read_labels
from training.batch_prediction.rows import Row

if TYPE_CHECKING:
    import pyarrow

_PNG_HEAD = png.SIGNATURE + b"\0\0\0\rIHDR"  # followed by width and height, four bytes each
_METADATA_BYTES = 1 << 16  # of a PNG that is left to the model; a batch of them is in memory at once


class Predictor:
    """Predicts batches with an exported model. Threads may call it at the same time.

    Args:
        version: the folder of the SavedModel.

    Attributes:
        schema: of the result. Its metadata has the model's name, version and class names.

    Raises:
        PredictionError: as for `Classifier`.
    """

    def __init__(self, version: Path) -> None:
        self.classifier = Classifier(version)
        height, width = self.classifier.image_size
        self._png_head = _PNG_HEAD + struct.pack(">II", width, height)
        self._png_bytes = 3 * height * width + _METADATA_BYTES
        self.schema = make_schema(
            name=version.parent.name,
            version=version.name,
            class_names=self.classifier.class_names,
            has_guard=self.classifier.has_guard,
        )

    def predict(self, rows: Sequence[Row], first: int) -> pyarrow.RecordBatch:
        """Predict rows, of which `first` is the number of the first one in the source.

        Returns:
            A record batch of `schema`, one row for each; an image that cannot be read has nothing but an error.

        Raises:
            PredictionError: the model fails.
        """
        errors: list[str | None] = [None] * len(rows)
        kept: dict[int, bytes] = {}  # files that the first decoder has read and left to the second
        outputs = self._predict_files(rows, errors, kept) or self._predict_pixels(rows, errors, kept)
        return self._make_columns(rows, first, outputs, errors)

    def _predict_files(self, rows: Sequence[Row], errors: list[str | None], kept: dict[int, bytes]) -> Outputs | None:
        """Predict with the model's own decoder; None unless it decodes all files that can be read as Pillow does."""
        if not self.classifier.decodes_files:
            return None
        found = list(errors)
        for index, row in enumerate(rows):
            try:
                data = kept[index] = row.read()
            except UnreadableImage as error:
                found[index] = str(error)
                continue
            is_exact = data.startswith(self._png_head) and len(data) <= self._png_bytes
            if not is_exact or not (_is_plain(data) or png.is_opaque_and_upright(data)):
                return None
        if not kept:
            return None
        try:
            outputs = self.classifier.classify_files([*kept.values()])
        except InvalidFilesError:
            return None  # the other decoder tells which of them is damaged
        errors[:] = found
        return outputs

    def _predict_pixels(self, rows: Sequence[Row], errors: list[str | None], kept: dict[int, bytes]) -> Outputs | None:
        height, width = self.classifier.image_size
        pixels = np.empty((len(rows), height, width, 3), np.uint8)
        count = 0
        for index, row in enumerate(rows):
            try:
                image = read_rgb(kept.pop(index, b"") or row.read())
            except UnreadableImage as error:
                errors[index] = str(error)
                continue
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels[count] = np.asarray(image)
            count += 1
        return self.classifier.classify(pixels[:count]) if count else None

    def _make_columns(
        self, rows: Sequence[Row], first: int, outputs: Outputs | None, errors: list[str | None]
    ) -> pyarrow.RecordBatch:
        import pyarrow as pa

        is_missing = np.array([error is not None for error in errors])
        places = np.flatnonzero(~is_missing)
        count, classes = len(rows), len(self.classifier.class_names)
        columns = {
            "source": pa.array([row.source for row in rows], pa.string()),
            "index": pa.array(np.arange(first, first + count, dtype=np.int64)),
            "error": pa.array(errors, pa.string()),
        }
        if outputs is None:
            missing = {field.name: pa.nulls(count, field.type) for field in self.schema if field.name not in columns}
            return pa.RecordBatch.from_pydict({**missing, **columns}, schema=self.schema)

        def spread(values: np.ndarray) -> pa.Array:
            """Return a column with these values at the places of the images that were read."""
            spreading = np.zeros(count, values.dtype)
            spreading[places] = values
            return pa.array(spreading, mask=is_missing)

        def spread_lists(values: pa.Array, lengths: np.ndarray) -> pa.Array:
            sizes = np.zeros(count + 1, np.int32)
            sizes[1 + places] = lengths
            return pa.ListArray.from_arrays(
                pa.array(np.cumsum(sizes, dtype=np.int32)), values, mask=pa.array(is_missing)
            )

        probabilities = np.asarray(outputs["probabilities"], np.float32)
        class_ids, labels = read_labels(outputs, self.classifier.class_names)
        columns |= {
            "label": spread(np.array(labels, object)),
            "class_id": spread(np.asarray(class_ids, np.int64)),
            "confidence": spread(np.maximum.reduce(probabilities, axis=1)),
            "probabilities": spread_lists(pa.array(probabilities.ravel()), np.full(len(places), classes)),
        }
        if self.classifier.has_guard:
            members = outputs["label_set"].astype(bool)
            names = np.array(self.classifier.class_names, object)[np.nonzero(members)[1]]
            columns |= {
                "typicality": spread(np.asarray(outputs["typicality"], np.float32)),
                "is_typical": spread(outputs["is_typical"].astype(bool)),
                "label_set": spread_lists(pa.array(names, pa.string()), members.sum(axis=1)),
            }
        return pa.RecordBatch.from_pydict(columns, schema=self.schema)


def _is_plain(data: bytes) -> bool:
    """Return whether a PNG file is grey or RGB with pixels right after its header: nothing makes it transparent."""
    return data[25:26] in (b"\0", b"\2") and data[37:41] == b"IDAT"


def make_schema(*, name: str, version: str, class_names: Sequence[str], has_guard: bool) -> pyarrow.Schema:
    """Return the schema of a result."""
    import pyarrow as pa

    guard = zip(GUARD_OUTPUTS, (pa.float32(), pa.bool_(), pa.list_(pa.string())), strict=True)
    return pa.schema(
        [
            pa.field("source", pa.string(), nullable=False),
            pa.field("index", pa.int64(), nullable=False),
            ("label", pa.string()),
            ("class_id", pa.int64()),
            ("confidence", pa.float32()),
            ("probabilities", pa.list_(pa.float32())),
            *(guard if has_guard else ()),
            ("error", pa.string()),
        ],
        metadata={"model": name, "version": version, "class_names": json.dumps(list(class_names))},
    )
