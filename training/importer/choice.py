"""Chooses the input scale and colour order with labelled images: the pair that is clearly best, or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training.errors import ModelError
from training.evaluation.calibration import apply_temperature, fit_temperature
from training.importer.preprocessing import Preprocessing

# A difference counts from this many standard errors on.
_CLEAR = 3.0
_SMALLEST = 1e-6  # probability; a few confidently wrong predictions must not decide


@dataclass(frozen=True)
class Candidate:
    """One preprocessing, evaluated.

    Attributes:
        preprocessing: what was tried.
        accuracy: share of the images, from 0 to 1.
        losses: float64 (n,), cross-entropy of each image in nats, at the temperature that is best for them: a scale
            with larger values makes a network more confident, not better.
    """

    preprocessing: Preprocessing
    accuracy: float
    losses: np.ndarray

    @property
    def loss(self) -> float:
        """The mean cross-entropy."""
        return float(self.losses.mean())


def evaluate_candidates(
    candidates: Iterable[Preprocessing],
    predict: Callable[[Preprocessing, np.ndarray], np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
) -> list[Candidate]:
    """Evaluate each preprocessing on labelled images; return the most accurate first.

    Args:
        candidates: what to try.
        predict: returns probabilities (n, classes) of images.
        images: uint8 (n, height, width, 3).
        labels: int64 (n,).
    """
    evaluated = []
    for preprocessing in candidates:
        probabilities = predict(preprocessing, images)
        if np.isfinite(probabilities).all():
            probabilities = apply_temperature(probabilities, fit_temperature(probabilities, labels))
        own = np.nan_to_num(probabilities[np.arange(len(labels)), labels].astype(np.float64))
        accuracy = float((probabilities.argmax(axis=1) == labels).mean())
        evaluated.append(Candidate(preprocessing, accuracy, -np.log(np.maximum(own, _SMALLEST))))
    return sorted(evaluated, key=lambda each: (-each.accuracy, each.loss))


def choose(candidates: Sequence[Candidate], labels: np.ndarray) -> Preprocessing:
    """Return the preprocessing that is clearly best.

    It alone has the highest accuracy, clearly above always naming the most frequent class, and a loss that is lower
    than every other's by more than `_CLEAR` standard errors of the difference.

    Args:
        candidates: evaluated on the same images, the most accurate first.
        labels: int64 (n,), of these images.

    Raises:
        ModelError: none is clearly best; the message has the table.
    """
    best, *others = candidates
    count = len(labels)
    chance = float(np.bincount(labels).max() / count)
    if best.accuracy - chance <= _CLEAR * math.sqrt(chance * (1 - chance) / count):
        reason = (
            f"none is clearly more accurate on these {count} images than always naming the most frequent class "
            f"({chance:.1%}). Check the order of the labels (--labels), and that these are images of the model's kind"
        )
    elif rivals := [other for other in others if not _is_clearly_better(best, other)]:
        reason = (
            f"none is clearly best on these {count} images; {name_choice(rivals[0].preprocessing)} comes too close. "
            "Give the one that the model was trained with, or more images"
        )
    else:
        return best.preprocessing
    raise ModelError(f"the input scale is not clear from the images:\n{_render(candidates)}\n{reason}")


def name_choice(preprocessing: Preprocessing) -> str:
    """Return the options that fix a preprocessing."""
    color = f" --color {preprocessing.color}" if preprocessing.color != "grey" else ""
    return f"--input-scale {preprocessing.scale}{color}"


def table_rows(candidates: Sequence[Candidate]) -> list[tuple[str, str, str]]:
    """Return (options, accuracy, loss) of each candidate, for people."""
    return [(name_choice(each.preprocessing), f"{each.accuracy:.2%}", f"{each.loss:.4f}") for each in candidates]


def _is_clearly_better(best: Candidate, other: Candidate) -> bool:
    differences = other.losses - best.losses
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return float(differences.mean()) > _CLEAR * error and best.accuracy > other.accuracy


def _render(candidates: Sequence[Candidate]) -> str:
    rows = [("options", "accuracy", "loss"), *table_rows(candidates)]
    width = max(len(options) for options, _, _ in rows)
    return "\n".join(f"  {options:<{width}}  {accuracy:>8}  {loss:>8}" for options, accuracy, loss in rows)
