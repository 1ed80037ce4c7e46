"""BentoML, with adaptive batching: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html.

Pictures come as the JSON or the files of its own typed inputs, one a request, which its dispatcher gathers.
"""

from __future__ import annotations

import base64
import io
import os

import bentoml
import numpy as np
from PIL import Image

BATCHING = {"batchable": True, "batch_dim": 0, "max_batch_size": 64, "max_latency_ms": 1000}


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@bentoml.service(resources={"cpu": "2"}, traffic={"timeout": 60, "concurrency": 64})
class Classifier:
    def __init__(self) -> None:
        import tensorflow as tf

        self.tf = tf
        self.model = tf.saved_model.load(os.environ["MODEL"])
        self.infer = self.model.signatures["serving_default"]

    def classify(self, images: np.ndarray) -> np.ndarray:
        return self.infer(images=self.tf.constant(images.astype(np.uint8)))["probabilities"].numpy()

    @bentoml.api(**BATCHING)
    def pixels(self, images: np.ndarray) -> np.ndarray:
        return self.classify(images)

    @bentoml.api(**BATCHING)
    def base64(self, images: list[str]) -> np.ndarray:
        return self.classify(np.stack([decode(base64.b64decode(image)) for image in images]))

    @bentoml.api(**BATCHING)
    def upload(self, images: list[Image.Image]) -> np.ndarray:
        return self.classify(np.stack([np.asarray(image.convert("RGB")) for image in images]))
