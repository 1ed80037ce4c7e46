"""InferenceService: versions, validation and limits, without a server or a protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from serving.api.flask_app import ServingApp
from serving.errors import InvalidRequest, ModelFailed, ModelNotFound, TooLarge
from serving.inference.service import InferenceRequest, InferenceService
from serving.request_context import RequestContext, current_request

IMAGES = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def service(app: ServingApp) -> InferenceService:
    return app.inference


def predict(service: InferenceService, inputs: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    version = service.resolve("colours")
    return service.predict(version, InferenceRequest("serving_default", inputs)).outputs


def test_a_request_runs_on_the_version_that_was_resolved(service: InferenceService) -> None:
    version = service.resolve("colours", version="7")
    result = service.predict(version, InferenceRequest("serving_default", {"images": IMAGES}))
    assert (result.version.version, result.signature.name) == (7, "serving_default")
    assert result.outputs["probabilities"].shape == (2, 3)


@pytest.mark.parametrize("version", ["99999999999999999999", "-1", "x", "1.5", ""])
def test_an_invalid_version_number_is_refused(service: InferenceService, version: str) -> None:
    with pytest.raises(InvalidRequest, match="the version must be a whole number from 0 to 9223372036854775807, not"):
        service.resolve("colours", version=version)
    with pytest.raises(InvalidRequest, match="the version must be a whole number"):
        service.status("colours", version)


def test_a_missing_model_or_version_is_reported(service: InferenceService) -> None:
    with pytest.raises(ModelNotFound, match="there is no version 3 of model colours; available: 7") as missing:
        service.resolve("colours", version=3)
    assert str(missing.value.tensorflow_serving) == "Servable not found for request: Specific(colours, 3)"
    with pytest.raises(ModelNotFound, match='there is no model "x"; available: colours'):
        service.resolve("x", label="stable")
    with pytest.raises(InvalidRequest, match='model colours has no label "x"; it has no labels'):
        service.resolve("colours", label="x")
    with pytest.raises(InvalidRequest, match="by its number or by its label, not by both"):
        service.resolve("colours", version=7, label="x")


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"images": IMAGES, "other": IMAGES},
        {"images": IMAGES.astype(np.int32)},
        {"images": IMAGES[:0]},
        {"images": IMAGES[0]},
        {"images": IMAGES[:, :31]},
    ],
)
def test_invalid_inputs_are_refused_before_the_model_call(
    service: InferenceService, inputs: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.resolve("colours").predictor, "predict", lambda *_, **__: pytest.fail("was called"))
    with pytest.raises(InvalidRequest):
        predict(service, inputs)


def test_more_rows_than_the_limit_are_refused(service: InferenceService) -> None:
    small = InferenceService(service.repository, max_rows=1)
    with pytest.raises(TooLarge, match="the request has 2 rows; at most 1 are allowed"):
        predict(small, {"images": IMAGES})


@pytest.fixture
def past_deadline() -> Iterator[None]:
    token = current_request.set(RequestContext(deadline_s=0.0))
    yield
    current_request.reset(token)


@pytest.mark.usefixtures("past_deadline")
def test_the_deadline_of_the_current_request_is_used(service: InferenceService) -> None:
    with pytest.raises(ModelFailed) as passed:
        predict(service, {"images": IMAGES})
    assert passed.value.code == "DEADLINE_EXCEEDED"
