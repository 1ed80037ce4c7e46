"""Muon, the optimizer of the airbench network.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and airbench94_muon in
KellerJordan/cifar10-airbench: the update of convolution filters is their orthogonalized momentum; other variables use
SGD with Nesterov momentum. Keras's Muon uses AdamW for convolutions.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="training")
class Muon(keras.optimizers.Optimizer):
    """Orthogonalized updates for 4-dimensional variables, SGD with Nesterov momentum for the others.

    Args:
        learning_rate: of the filters; a number or a schedule. Those of biases and head are proportional to it.
        decay: weight decay of biases and head.
    """

    FILTER_MOMENTUM = 0.6
    MOMENTUM = 0.85
    BIAS_RATE, HEAD_RATE = 0.053 / 0.24, 0.67 / 0.24  # of the filters' learning rate

    def __init__(self, learning_rate: Any = 0.24, *, decay: float = 1e-3, name: str = "muon", **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.decay = decay

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self._momenta = [self.add_variable_from_reference(variable, name="momentum") for variable in variables]

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor) -> None:
        momentum = self._momenta[self._get_variable_index(variable)]
        if len(variable.shape) == 4:
            momentum.assign(self.FILTER_MOMENTUM * momentum + gradient)
            step = orthogonalize(gradient + self.FILTER_MOMENTUM * momentum)
            # Outputs are normalized, so the norm of the filters is arbitrary: keep that of orthogonal filters.
            length = tf.sqrt(float(variable.shape[-1]))
            variable.assign(variable * (length / tf.norm(variable)) - learning_rate * step)
            return
        rate = self.HEAD_RATE if len(variable.shape) == 2 else self.BIAS_RATE
        gradient += (self.decay / (rate * 0.24)) * variable
        momentum.assign(self.MOMENTUM * momentum + gradient)
        variable.assign_sub(rate * learning_rate * (gradient + self.MOMENTUM * momentum))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "decay": self.decay}


def orthogonalize(kernel: tf.Tensor, *, steps: int = 3) -> tf.Tensor:
    """Return the approximately nearest orthogonal matrix of a kernel (height, width, inputs, outputs).

    Newton-Schulz iterations with the coefficients of the paper, which bring all singular values near 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = tf.reshape(kernel, (-1, kernel.shape[-1]))
    matrix /= tf.norm(matrix) + 1e-7
    is_wide = matrix.shape[0] < matrix.shape[1]
    if is_wide:
        matrix = tf.transpose(matrix)
    for _ in range(steps):
        gram = tf.matmul(matrix, matrix, transpose_a=True)
        matrix = a * matrix + tf.matmul(matrix, b * gram + c * tf.matmul(gram, gram))
    return tf.reshape(tf.transpose(matrix) if is_wide else matrix, kernel.shape)
