"""What a client hands out, however it was transported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        file: the picture's name; `None` if it came without one.
        label: the most probable class.
        class_id: its position among the model's classes.
        confidence: its probability, 0 to 1.
        probabilities: of every class, by its name.
        model: the name of the model that answered.
        version: the version of it.
    """

    file: str | None
    label: str
    class_id: int
    confidence: float
    probabilities: Mapping[str, float]
    model: str
    version: int

    def top(self, count: int) -> list[tuple[str, float]]:
        """Return the `count` most probable classes as (label, probability), the first one first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[:count]
