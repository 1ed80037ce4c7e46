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
        measures = tf.stack([measure_energy(logits, probabilities), measure_variation(features)], axis=1)
        # Linear between the quantiles: each interval counts by how much of it the score has passed, from 0 to 6. Every
        # operation costs a small model time, and TensorFlow runs matmul, bias_add and relu6 as one.
        weights = np.array([self.energy_weight, self.variation_weight])
        mean_score = weights @ [self.energy_mean, self.variation_mean]
        slopes = 6 / np.maximum(np.diff(self.scores.astype(np.float64)), _EQUAL)
        kernel = np.outer(weights, slopes).astype(np.float32)
        bias = (slopes * (_EQUAL - mean_score - self.scores[:-1])).astype(np.float32)
        passed = tf.nn.relu6(tf.nn.bias_add(tf.matmul(measures, kernel), bias))
        # A millionth less than 1 / 6, so that rounding never gives more than 1.
        shares = (np.diff(LEVELS)[:, None] * (1 - 1e-6) / 6).astype(np.float32)
        typicality = tf.squeeze(tf.matmul(passed, shares), axis=1)
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
    constant = tf.reduce_mean(tf.square(tf.reduce_mean(features, axis=(1, 2))), axis=1)
    all_of_it = tf.reduce_mean(tf.square(features), axis=(1, 2, 3))
    return (all_of_it - constant) / (all_of_it + _TINY)
