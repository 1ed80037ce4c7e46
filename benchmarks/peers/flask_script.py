"""The thirty lines that most people write: Flask, the SavedModel, one route. Run by gunicorn with two workers."""

import base64
import io
import os

import numpy as np
import tensorflow as tf
from flask import Flask, jsonify, request
from PIL import Image

app = Flask(__name__)
model = tf.saved_model.load(os.environ["MODEL"])
infer = model.signatures["serving_default"]


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@app.post("/predict")
def predict():
    if request.files:
        images = np.stack([decode(file.read()) for file in request.files.values()])
    else:
        instances = request.get_json()["instances"]
        if isinstance(instances[0], dict):
            images = np.stack([decode(base64.b64decode(instance["b64"])) for instance in instances])
        else:
            images = np.array(instances, np.uint8)
    outputs = infer(images=tf.constant(images))
    return jsonify(
        predictions=[
            {"probabilities": row.tolist(), "label": label.decode()}
            for row, label in zip(outputs["probabilities"].numpy(), outputs["label"].numpy(), strict=True)
        ]
    )
