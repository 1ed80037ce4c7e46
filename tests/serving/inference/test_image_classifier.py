"""Detection of image classifiers, and their class names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.errors import InvalidRequest
from serving.inference.image_classifier import can_explain, class_names, image_size, read_classes
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


@pytest.mark.parametrize("outputs", [OUTPUTS[:1], OUTPUTS[:2], OUTPUTS[::2]])
def test_class_and_label_may_be_missing(outputs: tuple[TensorSpec, ...]) -> None:
    assert image_size(DescribedPredictor(signature_of(IMAGES, *outputs)), model="m") == (20, 30)


@pytest.mark.parametrize(
    "outputs",
    [
        OUTPUTS[1:],
        (TensorSpec("scores", "DT_FLOAT", (None, 3), "y:0"),),
        (TensorSpec("probabilities", "DT_FLOAT", (None,), "y:0"),),
        (OUTPUTS[0], TensorSpec("class_id", "DT_INT64", (None, 5), "y:1")),
        (OUTPUTS[0], TensorSpec("label", "DT_STRING", (None, 5), "y:2")),
    ],
)
def test_a_model_with_other_outputs_is_refused(outputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"is not an image classifier.* the output probabilities \(n, classes\)"):
        image_size(DescribedPredictor(signature_of(IMAGES, *outputs)), model="m")


PROBABILITIES = np.array([[0.2, 0.7, 0.1], [0.8, 0.1, 0.1]], np.float32)


def test_the_models_own_classes_are_used() -> None:
    labels = np.array([b"x", b"gr\xc3\xb6\xc3\x9fe"], object)
    outputs = {"probabilities": PROBABILITIES, "class_id": np.array([2, 0]), "label": labels}
    class_ids, names = read_classes(outputs, ["a", "b", "c"])
    assert (list(class_ids), names) == (
        [2, 0],
        ["x", "gr\N{LATIN SMALL LETTER O WITH DIAERESIS}\N{LATIN SMALL LETTER SHARP S}e"],
    )


@pytest.mark.parametrize("others", [{}, {"class_id": np.array([2, 2])}, {"label": np.array([b"x", b"y"], object)}])
def test_without_class_and_label_the_probabilities_decide(others: dict[str, np.ndarray]) -> None:
    class_ids, names = read_classes({"probabilities": PROBABILITIES, **others}, ["a", "b", "c"])
    assert (list(class_ids), names) == ([1, 0], ["b", "a"])


HEAT_MAP = TensorSpec("heat_map", "DT_FLOAT", (None, 20, 30), "h:0")


def explaining(images: TensorSpec, *outputs: TensorSpec) -> DescribedPredictor:
    explain = Signature("explain", "", {images.name: images}, {output.name: output for output in outputs})
    return DescribedPredictor({**signature_of(IMAGES, *OUTPUTS), "explain": explain})


def test_heat_maps_have_the_size_of_the_images() -> None:
    assert can_explain(explaining(IMAGES, HEAT_MAP, OUTPUTS[1]))
    assert not can_explain(DescribedPredictor(signature_of(IMAGES, *OUTPUTS)))
    for images, outputs in (
        (IMAGES, (HEAT_MAP,)),
        (IMAGES, (OUTPUTS[1],)),
        (IMAGES, (TensorSpec("heat_map", "DT_FLOAT", (None, 5, 5), "h:0"), OUTPUTS[1])),
        (TensorSpec("images", "DT_FLOAT", (None, 20, 30, 3), "x:0"), (HEAT_MAP, OUTPUTS[1])),
        (TensorSpec("pixels", "DT_UINT8", (None, 20, 30, 3), "x:0"), (HEAT_MAP, OUTPUTS[1])),
    ):
        assert not can_explain(explaining(images, *outputs))


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
