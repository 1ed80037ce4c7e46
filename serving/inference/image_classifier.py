"""The signature of image classifiers, which `/predict` and the web page require."""

from __future__ import annotations

from serving.errors import InvalidRequest
from serving.inference.repository import ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE, Predictor

FILES_SIGNATURE = "image_bytes"  # takes encoded image files; its input has the same name


def image_size(predictor: Predictor, *, model: str) -> tuple[int, int]:
    """Return the (height, width) of a model's input images.

    Raises:
        InvalidRequest: the default signature is not that of an image classifier: `images` uint8
            (n, height, width, 3) to `probabilities` (n, classes), `class_id` (n,) and `label` (n,).
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
                    and ranks.get("class_id", 0) in (1, None)
                    and ranks.get("label", 0) in (1, None)
                ):
                    return height, width
    raise InvalidRequest(
        f"model {model} is not an image classifier: expected a signature {DEFAULT_SIGNATURE} with the input images "
        "(uint8 (n, height, width, 3)) and the outputs probabilities, class_id and label. "
        f"Send tensors to /v1/models/{model}:predict"
    )


def class_names(version: ModelVersion, *, count: int) -> list[str]:
    """Return the names of a model's classes, or their numbers unless the model info has `count` names."""
    names = version.info.class_names
    return list(names) if len(names) == count else [str(class_id) for class_id in range(count)]
