"""Inference graphs of trained networks, without variables and with folded scales.

Rescaling is folded into the first convolution, batch norms into the convolutions before them, and the temperature into
the last layer. `training/exporter/verify.py` compares the outputs with the model's.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from training.models.airbench import HEAD_SCALE, Airbench, BatchNorm, Conv, crop_to_odd
from training.models.inference_graph import InferenceGraph, TensorFunction
from training.models.sequential import used_size

# Feature maps up to this height are pooled by MaxPoolV2, which TensorFlow never runs with oneDNN. A oneDNN pooling
# takes 20 us to start: MaxPoolV2 is much faster for one image, and equally fast for 64.
MAX_EIGEN_ROWS = 16


def fold_article_network(model: keras.Model, *, conv_activation: str, temperature: float) -> InferenceGraph:
    """Fold the article's network.

    Args:
        model: built by `build_sequential` or `build_subclass`; their weights have the same order.
        conv_activation: of the model.
        temperature: divisor of the logits.
    """
    weights = [weight.numpy() for weight in model.weights]
    *convolutions, hidden, output = zip(weights[::2], weights[1::2], strict=True)
    first_kernel, first_bias = convolutions[0]
    convolutions[0] = (first_kernel / np.float32(255), first_bias)
    output = (output[0] / np.float32(temperature), output[1] / np.float32(temperature))
    activation = keras.activations.get(conv_activation)

    def features(images: tf.Tensor) -> tf.Tensor:
        height, width = (used_size(size) for size in images.shape[1:3])
        result = tf.cast(images[:, :height, :width], tf.float32)
        for kernel, bias in convolutions:
            # In this order TensorFlow fuses convolution, bias and activation.
            result = _halve(activation(tf.nn.bias_add(tf.nn.conv2d(result, kernel, 1, "VALID"), bias)))
        return result

    def head(features: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(features, (-1, hidden[0].shape[0]))
        units = tf.nn.relu(tf.nn.bias_add(tf.matmul(flat, hidden[0]), hidden[1]))
        return tf.nn.bias_add(tf.matmul(units, output[0]), output[1])

    return InferenceGraph(features, head)


def fold_airbench(model: Airbench, *, temperature: float) -> InferenceGraph:
    """Fold an airbench network, dividing its logits by `temperature`.

    The scale of a batch norm is positive and the same for all pixels, so it can be applied before the pooling.
    """
    whitening_kernel, whitening_bias = model.whitening.kernel.numpy(), model.whitening.offset.numpy()
    blocks = [
        [(*_fold_norm(conv, norm), conv.padding) for conv, norm in zip(block.convs, block.norms, strict=True)]
        for block in (model.block1, model.block2, model.block3)
    ]
    head_kernel = model.head.kernel.numpy() * np.float32(HEAD_SCALE / temperature)

    def features(images: tf.Tensor) -> tf.Tensor:
        result = tf.nn.conv2d(tf.cast(crop_to_odd(images), tf.float32), whitening_kernel, 1, "VALID")
        result = tf.nn.relu(tf.nn.bias_add(result, whitening_bias))
        for block in blocks:
            for number, (kernel, bias, padding) in enumerate(block):
                new = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(result, kernel, 1, padding), bias))
                if number == 0:
                    new = _halve(new)
                result = result + new if number >= 2 else new
        return result

    def head(features: tf.Tensor) -> tf.Tensor:
        return tf.matmul(tf.reduce_max(features, axis=(1, 2)), head_kernel)

    return InferenceGraph(features, head)


def _halve(features: tf.Tensor) -> tf.Tensor:
    """Pool with 2x2 maximum."""
    if features.shape[1] > MAX_EIGEN_ROWS:
        return tf.nn.max_pool2d(features, 2, 2, "VALID")
    return tf.raw_ops.MaxPoolV2(input=features, ksize=[1, 2, 2, 1], strides=[1, 2, 2, 1], padding="VALID")


def _fold_norm(conv: Conv, norm: BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel and bias of a convolution equivalent to `conv` followed by `norm`."""
    scale = 1 / np.sqrt(norm.variance.numpy() + norm.EPSILON)
    return conv.kernel.numpy() * scale, norm.bias.numpy() - norm.mean.numpy() * scale


def compute_logits(model: keras.Model, images: tf.Tensor) -> tf.Tensor:
    """Return the logits, float32 (n, classes), of a model built by `build_model`."""
    if not isinstance(model, keras.Sequential):
        return model.logits(images)
    *inner, output = model.layers
    features = images
    for layer in inner:
        features = layer(features)
    return tf.matmul(features, output.kernel) + output.bias


def freeze(model: TensorFunction, spec: tf.TensorSpec) -> TensorFunction:
    """Return a function of one tensor with its variables converted to constants."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    frozen = convert_variables_to_constants_v2(tf.function(lambda tensor: model(tensor)).get_concrete_function(spec))
    return lambda tensor: frozen(tensor)[0]
