"""Renders the response of `/predict`: label, confidence and all probabilities of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import orjson

from serving.api.predict.parsing import UploadedImage
from serving.inference.image_classifier import class_names, read_classes
from serving.inference.service import InferenceResult


def render(images: Sequence[UploadedImage], result: InferenceResult, timing_ms: Mapping[str, float]) -> bytes:
    """Encode the response: one prediction per image, in the order sent."""
    version, outputs = result.version, result.outputs
    names = class_names(version, count=outputs["probabilities"].shape[1])
    class_ids, labels = read_classes(outputs, names)
    columns = zip(
        images,
        labels,
        class_ids,
        np.maximum.reduce(outputs["probabilities"], axis=1),
        outputs["probabilities"],
        strict=True,
    )
    document = {
        "model": {"name": version.name, "version": version.version},
        "predictions": [
            {
                "file": image.file,
                "label": label,
                "class_id": class_id,
                "confidence": confidence,
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for image, label, class_id, confidence, row in columns
        ],
        "timing_ms": timing_ms,
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
