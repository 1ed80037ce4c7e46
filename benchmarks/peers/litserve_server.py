"""LitServe, with batching: https://lightning.ai/docs/litserve/features/batching. FORM tells what a request holds."""

import base64
import io
import os

import litserve as ls
import numpy as np
from fastapi import Request, UploadFile
from PIL import Image

FORM = os.environ["FORM"]


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class Classifier(ls.LitAPI):
    def setup(self, device):  # noqa: ARG002
        import tensorflow as tf

        self.tf = tf
        self.model = tf.saved_model.load(os.environ["MODEL"])
        self.infer = self.model.signatures["serving_default"]

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, images):
        outputs = self.infer(images=self.tf.constant(images))
        return outputs["probabilities"].numpy(), outputs["label"].numpy()

    def unbatch(self, output):
        return list(zip(*output, strict=True))

    def encode_response(self, output):
        row, label = output
        return {"probabilities": row.tolist(), "label": label.decode()}


class JsonClassifier(Classifier):
    def decode_request(self, request: Request):
        (instance,) = request["instances"]
        return decode(base64.b64decode(instance["b64"])) if FORM == "base64" else np.array(instance, np.uint8)


class UploadClassifier(Classifier):
    def decode_request(self, request: UploadFile):
        return decode(request.file.read())


if __name__ == "__main__":
    api = (UploadClassifier if FORM == "upload" else JsonClassifier)(max_batch_size=64, batch_timeout=0.005)
    # One worker a device: TensorFlow itself uses every core.
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="error")
