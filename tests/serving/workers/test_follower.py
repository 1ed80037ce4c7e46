"""How a worker releases versions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from serving.inference.model_info import ModelInfo
from serving.workers.follower import FollowingRepository
from serving.workers.leader import LoadedInWorkers
from serving.workers.messages import Served, State


def test_a_version_is_forgotten_before_it_is_released() -> None:
    """The thread that is told of the release reports it only if the load is not served any more."""
    channel: Any = None
    loader: Any = None
    repository = FollowingRepository(
        channel,
        required=(),
        loader=loader,
        wrap_predictor=lambda _name, _predictor, unbatched: LoadedInWorkers(5, unbatched),
    )
    is_served_at_release = []
    released: Any = SimpleNamespace(put=lambda item: is_served_at_release.append(item[1] in repository._predictors))
    repository._released = released
    loaded: Any = SimpleNamespace(predictor=LoadedInWorkers(5, ()))
    repository._predictors[5] = loaded
    repository.apply(State(is_loaded=True, versions={"colours": {1: Served(5, ModelInfo(), frozenset())}}))
    assert is_served_at_release == []
    repository.apply(State(is_loaded=True))
    assert is_served_at_release == [False]
