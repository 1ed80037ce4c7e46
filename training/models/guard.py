"""The guard of a classifier: how typical an image is of those in training, and which labels cannot be ruled out.

An image is typical by two measures of one forward pass, added in units of their standard deviations:

- the energy, the logarithm of the sum of the exponential logits (Liu et al. 2020, arXiv 2010.03759): images unlike
  those in training excite no class;
- the variation, the share of the squared features that varies over the image: the features of a photograph of an object
  are local, those of noise, texture, text or a plain area the same everywhere. Without a feature map it is left out.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from training.storage import write_file

MIN_TYPICALITY = 0.05  # below it an image is not typical: this share of the images of the dataset is not
# Quantiles of the scores that are kept: the lowest are those that matter.
LEVELS = np.append([0, 0.001, 0.002, 0.005], np.linspace(0.01, 1, 100))
_EQUAL = 1e-3  # standard deviations: scores closer than this are equally typical
_TINY = 1e-6  # avoids 0 / 0 for features that are all 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Guard:
    """Constants of the `guarded` signatures, fitted on images that were not used for training.

    Attributes:
        energy_mean, energy_weight: mean, and reciprocal of the standard deviation; 0 for an energy that is constant.
        variation_mean, variation_weight: the same of the variation.
        scores: float32 (104,), quantiles of the sum at `LEVELS`.
        set_threshold: smallest probability of a label in the prediction set.
        examples: uint8 (m, height, width, 3), some of the images, to verify an export with.
        example_typicality: float32 (m,), of these.
    """

    energy_mean: float
    energy_weight: float
    variation_mean: float
    variation_weight: float
    scores: np.ndarray
    set_threshold: float
    examples: np.ndarray
    example_typicality: np.ndarray

    def outputs(self, features: tf.Tensor, logits: tf.Tensor, probabilities: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return `typicality` float32 (n,) from 0 to 1, `is_typical` bool (n,), `label_set` bool (n, classes).

        The typicality is the share of the images of the dataset that are less typical.

        Args:
            features: of an `InferenceGraph`.
            logits: of the same.
            probabilities: float32 (n, classes), the softmax of the logits.
        """
        energy = self.energy_weight * (measure_energy(logits, probabilities) - self.energy_mean)
        variation = self.variation_weight * (measure_variation(features) - self.variation_mean)
        below, above = self.scores[:-1], self.scores[1:]
        # Linear between the quantiles.
        passed = ((energy + variation)[:, None] - below + _EQUAL) / np.maximum(above - below, _EQUAL)
        typicality = tf.linalg.matvec(tf.clip_by_value(passed, 0, 1), np.diff(LEVELS).astype(np.float32))
        typicality = tf.minimum(typicality, 1)  # rounding
        return {
            "typicality": tf.identity(typicality, "typicality"),
            "is_typical": tf.greater_equal(typicality, MIN_TYPICALITY, "is_typical"),
            "label_set": tf.greater_equal(probabilities, self.set_threshold, "label_set"),
        }

    def save(self, path: Path) -> None:
        """Write a .npz file, durably and atomically."""
        content = io.BytesIO()
        np.savez_compressed(content, **vars(self))
        write_file(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Guard:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.
        """
        try:
            with np.load(path) as file:
                arrays = {field.name: file[field.name] for field in dataclasses.fields(cls)}
        except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        values: dict[str, Any] = {name: value if value.ndim else float(value) for name, value in arrays.items()}
        return cls(**values)


def measure_energy(logits: tf.Tensor, probabilities: tf.Tensor) -> tf.Tensor:
    """Return the logarithm of the sum of the exponential logits, float32 (n,)."""
    # By the largest probability, which is at least 1 / classes: fewer operations than from the logits alone.
    return tf.reduce_max(logits, axis=1) - tf.math.log(tf.reduce_max(probabilities, axis=1))


def measure_variation(features: tf.Tensor) -> tf.Tensor:
    """Return the share of the squared features that varies over the image, float32 (n,) from 0 to 1.

    Args:
        features: float32 (n, rows, columns, channels), or (n, channels), which does not vary.
    """
    if features.shape.rank == 2:
        return tf.zeros_like(features[:, 0])
    constant = tf.reduce_sum(tf.square(tf.reduce_mean(features, axis=(1, 2))), axis=1)
    all_of_it = tf.reduce_sum(tf.reduce_mean(tf.square(features), axis=(1, 2)), axis=1)
    return 1 - (constant + _TINY) / (all_of_it + _TINY)
