"""The signature of image classifiers, which `/predict` and the web page require."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from serving.errors import InvalidRequest
from serving.inference.repository import ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE, Predictor

FILES_SIGNATURE = FILES_INPUT = "image_bytes"  # takes encoded image files
GUARDED_SIGNATURE, GUARDED_FILES_SIGNATURE = "guarded", "guarded_bytes"  # the same two with the limits of a prediction
GUARD_OUTPUTS = ("typicality", "is_typical", "label_set")
EXPLAIN_SIGNATURE = "explain"  # maps images to heat maps of the predicted class


def image_size(predictor: Predictor, *, model: str) -> tuple[int, int]:
    """Return the (height, width) of a model's input images.

    Raises:
        InvalidRequest: the default signature is not that of an image classifier: `images` uint8
            (n, height, width, 3) to `probabilities` (n, classes) and, optionally, `class_id` (n,) and `label` (n,).
    """
    signature = predictor.signatures.get(DEFAULT_SIGNATURE)
    if signature and signature.inputs.keys() == {"images"}:
        spec = signature.inputs["images"]
        ranks = {
            name: None if output.shape is None else len(output.shape) for name, output in signature.outputs.items()
        }
        match spec.dtype, spec.shape:
            case "DT_UINT8", (None, int(height), int(width), 3):
                if (
                    ranks.get("probabilities", 0) in (2, None)
                    and ranks.get("class_id", 1) in (1, None)
                    and ranks.get("label", 1) in (1, None)
                ):
                    return height, width
    raise InvalidRequest(
        f"model {model} is not an image classifier: expected a signature {DEFAULT_SIGNATURE} with the input images "
        "(uint8 (n, height, width, 3)) and the output probabilities (n, classes), besides which it may return class_id "
        "and label of each image. "
        f"Send tensors to /v1/models/{model}:predict"
    )


def choose_signature(predictor: Predictor, *, input_name: str) -> str | None:
    """Return the signature that classifies `images` or `image_bytes`: with the limits of a prediction, if it can."""
    guarded, plain = (
        (GUARDED_FILES_SIGNATURE, FILES_SIGNATURE)
        if input_name == FILES_INPUT
        else (GUARDED_SIGNATURE, DEFAULT_SIGNATURE)
    )
    signature = predictor.signatures.get(guarded)
    if signature and signature.inputs.keys() == {input_name} and has_guard(signature.outputs):
        return guarded
    signature = predictor.signatures.get(plain)
    return plain if signature and signature.inputs.keys() == {input_name} else None


def has_guard(outputs: Mapping[str, object]) -> bool:
    """Return whether the outputs tell the limits of a prediction."""
    return all(name in outputs for name in GUARD_OUTPUTS)


def class_names(version: ModelVersion, *, count: int) -> list[str]:
    """Return the names of a model's classes, or their numbers unless the model info has `count` names."""
    names = version.info.class_names
    return list(names) if len(names) == count else [str(class_id) for class_id in range(count)]


def read_classes(outputs: Mapping[str, np.ndarray], names: Sequence[str]) -> tuple[Iterable[int], list[str]]:
    """Return the most probable class of each image, as its number and its label.

    Args:
        outputs: of an image classifier. Unless it returns both `class_id` and `label`, the probabilities decide.
        names: of all classes.
    """
    if "class_id" in outputs and "label" in outputs:
        return outputs["class_id"], [label.decode("utf-8", errors="replace") for label in outputs["label"]]
    class_ids = outputs["probabilities"].argmax(axis=1).tolist()
    return class_ids, [names[class_id] for class_id in class_ids]


def can_explain(predictor: Predictor) -> bool:
    """Return whether an image classifier has heat maps: its images to `heat_map` (n, height, width) and `class_id`."""
    signature = predictor.signatures.get(EXPLAIN_SIGNATURE)
    if signature is None or signature.inputs.keys() != {"images"} or "class_id" not in signature.outputs:
        return False
    images, heat_map = signature.inputs["images"], signature.outputs.get("heat_map")
    expected = predictor.signatures[DEFAULT_SIGNATURE].inputs["images"]
    if (images.dtype, images.shape) != (expected.dtype, expected.shape) or images.shape is None or heat_map is None:
        return False
    return heat_map.shape in (None, images.shape[:3])
