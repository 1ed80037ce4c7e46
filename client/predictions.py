"""What the client returns: a prediction or a failure for each picture, and the service's status."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one picture.

    Attributes:
        file: the path as it was given; None for a picture that was given as bytes or pixels.
        label: the most probable class.
        class_id: its number.
        confidence: its probability, 0 to 1.
        probabilities: the probability of every label, in the order of the class numbers.
        model: the name of the model that answered.
        model_version: its version.
    """

    file: str | None
    label: str
    class_id: int
    confidence: float
    probabilities: dict[str, float]
    model: str
    model_version: int

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the `k` most probable labels with their probabilities, best first."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        return sorted(self.probabilities.items(), key=lambda item: item[1], reverse=True)[:k]


@dataclass(frozen=True)
class Failure:
    """A picture without a prediction: `index` is its place among those given, `file` its path or None."""

    index: int
    file: str | None
    reason: str


@dataclass(frozen=True)
class ModelStatus:
    """One version of a model; `state` is TensorFlow Serving's word: AVAILABLE once it answers."""

    name: str
    version: int
    state: str
    error: str | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """Whether the service is ready to predict, why not if not, and what it serves."""

    ready: bool
    reason: str | None
    models: tuple[ModelStatus, ...]
