"""Detection of image classifiers, and their class names."""

from __future__ import annotations

from typing import Any

import pytest

from serving.errors import InvalidRequest
from serving.inference.image_classifier import class_names, image_size
from serving.inference.model_info import ModelInfo
from serving.inference.repository import ModelVersion
from serving.inference.signatures import Signature, TensorSpec


def signature_of(images: TensorSpec, *outputs: TensorSpec) -> dict[str, Signature]:
    return {
        "serving_default": Signature(
            "serving_default", "", {images.name: images}, {output.name: output for output in outputs}
        )
    }


class DescribedPredictor:
    def __init__(self, signatures: dict[str, Signature]) -> None:
        self.signatures = signatures

    def predict(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("only described")


IMAGES = TensorSpec("images", "DT_UINT8", (None, 20, 30, 3), "x:0")
OUTPUTS = (
    TensorSpec("probabilities", "DT_FLOAT", (None, 3), "y:0"),
    TensorSpec("class_id", "DT_INT64", (None,), "y:1"),
    TensorSpec("label", "DT_STRING", None, "y:2"),
)


def test_the_image_size_is_read_from_the_signature() -> None:
    assert image_size(DescribedPredictor(signature_of(IMAGES, *OUTPUTS)), model="m") == (20, 30)


@pytest.mark.parametrize(
    "images",
    [
        TensorSpec("images", "DT_FLOAT", (None, 20, 30, 3), "x:0"),
        TensorSpec("images", "DT_UINT8", (None, 20, 30, 1), "x:0"),
        TensorSpec("images", "DT_UINT8", (None, None, None, 3), "x:0"),
        TensorSpec("images", "DT_UINT8", (8, 20, 30, 3), "x:0"),
        TensorSpec("images", "DT_UINT8", None, "x:0"),
        TensorSpec("pixels", "DT_UINT8", (None, 20, 30, 3), "x:0"),
    ],
)
def test_a_model_with_another_input_is_refused(images: TensorSpec) -> None:
    with pytest.raises(InvalidRequest, match="is not an image classifier"):
        image_size(DescribedPredictor(signature_of(images, *OUTPUTS)), model="m")


@pytest.mark.parametrize("missing", range(3))
def test_a_model_without_one_of_the_outputs_is_refused(missing: int) -> None:
    outputs = OUTPUTS[:missing] + OUTPUTS[missing + 1 :]
    with pytest.raises(InvalidRequest, match="is not an image classifier"):
        image_size(DescribedPredictor(signature_of(IMAGES, *outputs)), model="m")


def test_a_model_without_signatures_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="is not an image classifier"):
        image_size(DescribedPredictor({}), model="m")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("a", "b"), ["a", "b"]), (("a", "b", "c"), ["0", "1"]), ((), ["0", "1"])],
)
def test_class_names_are_used_if_their_number_matches(names: tuple[str, ...], expected: list[str]) -> None:
    version = ModelVersion("m", 1, DescribedPredictor({}), ModelInfo(names))
    assert class_names(version, count=2) == expected
