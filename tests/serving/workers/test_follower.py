"""How a worker releases versions."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from serving.inference.model_info import ModelInfo
from serving.inference.signatures import Signature
from serving.workers.follower import FollowingRepository
from serving.workers.messages import Served, State


class Predictor:
    """Stands for a loaded version."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner
        self.signatures: Mapping[str, Signature] = {}

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        raise NotImplementedError


def test_a_version_is_forgotten_before_it_is_released() -> None:
    """The thread that is told of the release reports it only if the load is not served any more."""
    channel: Any = None
    loader: Any = None
    repository = FollowingRepository(
        channel, required=(), loader=loader, wrap_predictor=lambda _name, predictor, _unbatched: Predictor(predictor)
    )
    is_served_at_release = []
    released: Any = SimpleNamespace(put=lambda item: is_served_at_release.append(item[1] in repository._predictors))
    repository._released = released
    loaded: Any = SimpleNamespace(predictor=Predictor())
    repository._predictors[5] = loaded
    repository.apply(State(is_loaded=True, versions={"colours": {1: Served(5, ModelInfo(), frozenset())}}))
    assert is_served_at_release == []
    repository.apply(State(is_loaded=True))
    assert is_served_at_release == [False]
