"""An imported model whose outputs are known: its logits, its probabilities, and the graph to export."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from training.importer.network import Network
from training.importer.outputs import Outputs
from training.importer.preprocessing import Preprocessing
from training.models.inference_graph import InferenceGraph

_BATCH_SIZE = 64


class Classifier:
    """A model with its outputs known, cut at its last feature map.

    Attributes:
        network: the model's graph.
        outputs: what it returns.
        feature_map: (n, rows, columns, channels) in the frozen graph; `None` if there is none.
    """

    def __init__(self, network: Network, outputs: Outputs, *, layout: str) -> None:
        self.network = network
        self.outputs = outputs
        # A network with the channels first has (n, channels, rows, columns), which is no such map.
        self.feature_map = network.last_feature_map(outputs.tensor) if layout == "nhwc" else None
        cut = outputs.tensor if self.feature_map is None else self.feature_map
        self._features = network.compute(cut)
        self._head = network.compute(outputs.tensor, cut)

    def logits(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return the logits, float32 (n, classes), of a batch as the model takes it."""
        return self.outputs.to_logits(self._head(self._features(inputs)))

    def logits_numpy(self, preprocessing: Preprocessing, images: np.ndarray) -> np.ndarray:
        """Return the logits, float64 (n, classes), of uint8 images that NumPy and Pillow have preprocessed."""
        logits: np.ndarray = self.logits(tf.constant(preprocessing.apply_numpy(images))).numpy()
        return logits.astype(np.float64)

    def predict(self, preprocessing: Preprocessing, images: np.ndarray) -> np.ndarray:
        """Return the probabilities, float32 (n, classes), of uint8 (n, height, width, 3)."""
        predict = tf.function(
            lambda batch: tf.nn.softmax(self.logits(preprocessing.apply(batch))), reduce_retracing=True
        )
        batches = range(0, len(images), _BATCH_SIZE)
        return np.concatenate([predict(tf.constant(images[n : n + _BATCH_SIZE])).numpy() for n in batches])

    def build_graph(self, preprocessing: Preprocessing, temperature: float) -> InferenceGraph:
        """Return the graph to export; without a feature map, its features are the logits."""
        divisor = np.float32(temperature)
        if self.feature_map is None:
            return InferenceGraph(lambda images: self.logits(preprocessing.apply(images)) / divisor, tf.identity)
        return InferenceGraph(
            lambda images: self._features(preprocessing.apply(images)),
            lambda features: self.outputs.to_logits(self._head(features)) / divisor,
        )
