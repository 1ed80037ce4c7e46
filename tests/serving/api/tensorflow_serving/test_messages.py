from __future__ import annotations

import json

import pytest

from serving.api.tensorflow_serving.messages import parse_examples, refusal
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec


def signature(inputs: list[str], outputs: list[str]) -> dict[str, Signature]:
    specs = {name: TensorSpec(name, "DT_STRING", (None,), f"{name}:0") for name in [*inputs, *outputs]}
    found = Signature(
        "serving_default",
        "tensorflow/serving/predict",
        {name: specs[name] for name in inputs},
        {name: specs[name] for name in outputs},
    )
    return {"serving_default": found}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "JSON Value: {} When method is classify, key 'examples' is expected and was not found"),
        ({"examples": 1}, "JSON Value: {\n    \"examples\": 1\n} Expecting 'examples' value to be an list/array"),
        ({"examples": []}, "JSON Value: {\n    \"examples\": []\n} 'examples' value is an empty array"),
        ({"examples": [{}, 1]}, "Example must be JSON object but got JSON Number"),
        ({"examples": [{}], "context": []}, "Example must be JSON object but got JSON Array"),
    ],
)
def test_invalid_examples_are_refused(document: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_examples(json.dumps(document).encode())
    assert str(refused.value) == message


def test_valid_examples_are_accepted() -> None:
    assert parse_examples(b'{"examples": [{"age": 46}, {}], "context": {"country": "DE"}}') == ""


NO_OUTPUTS = (
    'Expected classification signature outputs to contain at least one of "classes" or "scores". '
    "Signature was: inputs {"
)


@pytest.mark.parametrize(
    ("method", "inputs", "outputs", "message"),
    [
        ("classify", ["a", "b"], ["scores"], "Expected one input Tensor."),
        ("classify", ["inputs"], ["x", "y", "z"], "Expected one or two output Tensors, found 3"),
        ("classify", ["images"], ["scores"], "No classification inputs found in SignatureDef: inputs {"),
        ("classify", ["inputs"], ["x"], NO_OUTPUTS),
        ("regress", [], ["outputs"], "Expected one input Tensor."),
        ("regress", ["inputs"], ["x", "y"], "Expected one output Tensor."),
        ("regress", ["images"], ["outputs"], "No regression inputs found in SignatureDef: inputs {"),
        ("regress", ["inputs"], ["x"], "No regression outputs found in SignatureDef: inputs {"),
    ],
)
def test_signatures_are_refused_with_tensorflow_servings_messages(
    method: str, inputs: list[str], outputs: list[str], message: str
) -> None:
    error = refusal("", signature(inputs, outputs), method=method)
    assert error.status == 400
    assert str(error).splitlines()[0] == message


def test_an_unknown_signature_is_named() -> None:
    assert str(refusal("x", {}, method="classify")) == "No signature was found with the name: x"
    assert str(refusal("", {}, method="regress")) == "No signature was found with the name: serving_default"


@pytest.mark.parametrize(("method", "outputs"), [("classify", ["classes", "scores"]), ("regress", ["outputs"])])
def test_a_matching_signature_is_501(method: str, outputs: list[str]) -> None:
    error = refusal("", signature(["inputs"], outputs), method=method)
    assert error.status == 501
    assert f"{method} is not implemented" in str(error)
