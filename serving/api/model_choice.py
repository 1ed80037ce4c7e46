"""The model version that a request names, for the protocols whose messages are our own: /predict and /v2.

TensorFlow Serving's API has the messages of the real server, which `ModelRepository.resolve` raises.
"""

from __future__ import annotations

from serving.api.open_inference.tensors import quote
from serving.errors import InvalidRequest, ModelNotFound
from serving.inference.model_config import read_version_number
from serving.inference.repository import ModelRepository, ModelVersion


def choose_version(
    repository: ModelRepository, name: str, *, version: str | None = None, label: str | None = None
) -> ModelVersion:
    """Return the newest version of a model, or the one with a number or a label, as the request spells them.

    Raises:
        InvalidRequest: the number is none, no version has the label, or both are given.
        ModelNotFound: there is no such model or version.
        NotReady: the model is still being loaded.
    """
    if version is not None and label is not None:
        raise InvalidRequest("choose a version by its number or by its label, not by both")
    number = None if version is None else read_version_number(version)
    names = repository.all_names()
    if name not in names:
        served = f"there are {', '.join(names)}" if names else "none is served"
        raise ModelNotFound(f"there is no model {quote(name)}; {served}")
    try:
        if label is None:
            return repository.resolve(name, version=number)
        newest = repository.resolve(name)  # labels are known once the model is loaded
        labels = repository.labels(name)
        number = labels.get(label)
        if number is None:
            has = f"it has {', '.join(sorted(labels))}" if labels else "it has none"
            raise InvalidRequest(f"model {name} has no label {quote(label)}; {has}")
        return newest if newest.version == number else repository.resolve(name, version=number)
    except ModelNotFound as error:
        if number is None:
            raise ModelNotFound(f"model {name} cannot be used: {repository.problem(name)}") from error
        available = ", ".join(map(str, repository.available_versions(name))) or "none"
        raise ModelNotFound(f"there is no version {number} of model {name}; available: {available}") from error
