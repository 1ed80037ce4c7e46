"""Models whose rows influence each other are detected at load and not batched."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tensorflow as tf

from serving.inference import row_independence
from serving.inference.row_independence import find_dependent_signatures
from serving.inference.saved_model import SavedModelPredictor
from tests.serving.conftest import Server
from tests.serving.saved_models import write_warmup_records

pytestmark = pytest.mark.slow

FLOAT, STRING = tf.float32, tf.string


def spec(*shape: int | None, dtype: tf.DType = FLOAT, name: str = "x") -> tf.TensorSpec:
    return tf.TensorSpec((None, *shape), dtype, name=name)


def save(path: Path, function: Callable[..., Any], *specs: tf.TensorSpec) -> Path:
    signature = tf.function(lambda *inputs: {"y": function(*inputs)}, input_signature=specs)
    tf.saved_model.save(tf.Module(), str(path), signatures=signature)
    return path


def find(path: Path) -> frozenset[str]:
    return find_dependent_signatures(path, SavedModelPredictor(path))


def normalize(x: tf.Tensor) -> tf.Tensor:
    """Batch normalization in training mode."""
    mean, variance = tf.nn.moments(x, [0])
    return (x - mean) / tf.sqrt(variance + 1e-3)


def convolve(images: tf.Tensor) -> tf.Tensor:
    kernel = tf.constant(np.random.default_rng(0).normal(size=(3, 3, 3, 4)), FLOAT)
    return tf.nn.relu(tf.nn.conv2d(tf.cast(images, FLOAT) / 255, kernel, 1, "SAME"))


def decode(files: tf.Tensor) -> tf.Tensor:
    def decode_one(file: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(file, channels=3, expand_animations=False)
        return tf.image.resize(image, (8, 8))

    return tf.map_fn(decode_one, files, fn_output_signature=FLOAT)


def multiply(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    kernel = tf.cast(tf.constant(np.random.default_rng(0).normal(size=(64, 64)), FLOAT), dtype)
    for _ in range(4):
        x = tf.nn.tanh(tf.cast(tf.matmul(tf.cast(x, dtype), kernel), FLOAT))
    return x


def lengths_to_longest(texts: tf.Tensor) -> tf.Tensor:
    lengths = tf.strings.length(texts)
    return tf.reduce_max(lengths) - lengths


def parse(serialized: tf.Tensor) -> tf.Tensor:
    return tf.io.parse_example(serialized, {"v": tf.io.FixedLenFeature([2], FLOAT)})["v"]


DEPENDENT = {
    "batch normalization": (normalize, spec(4)),
    "batch normalization of images": (lambda x: normalize(convolve(x)), spec(8, 8, 3, dtype=tf.uint8)),
    "batch normalization of files": (lambda x: normalize(decode(x)), spec(dtype=STRING, name="image_bytes")),
    "batch normalization of sequences of any length": (normalize, spec(None, 4)),
    "softmax over the batch": (lambda x: tf.nn.softmax(x, axis=0), spec(4)),
    "divided by the largest": (lambda x: x / tf.reduce_max(tf.abs(x)), spec(4)),
    "a small part of the mean": (lambda x: x + 1e-4 * tf.reduce_mean(x, 0, keepdims=True), spec(4)),
    "cumulative sum": (tf.cumsum, spec()),
    "integers": (lambda x: x - tf.reduce_min(x), spec(dtype=tf.int64)),
    "booleans": (lambda x: x & tf.reduce_all(x), spec(3, dtype=tf.bool)),
    "texts": (lengths_to_longest, spec(dtype=STRING)),
    "ranks": (lambda x: tf.argsort(tf.argsort(x)), spec()),
    "number of rows": (lambda x: x / tf.cast(tf.shape(x)[0], FLOAT), spec()),
    "reversed": (lambda x: x[::-1], spec()),
}  # fmt: skip
INDEPENDENT = {
    "convolution": (convolve, spec(32, 32, 3, dtype=tf.uint8)),
    "convolution of any size": (convolve, spec(None, None, 3, dtype=tf.uint8)),
    "files": (decode, spec(dtype=STRING, name="image_bytes")),
    "texts": (tf.strings.upper, spec(dtype=STRING)),
    "float16 inside": (lambda x: multiply(x, tf.float16), spec(64)),
    "bfloat16 inside": (lambda x: multiply(x, tf.bfloat16), spec(64)),
    "lookup in a small table": (lambda x: tf.gather([1.0, 2.0], x), spec(dtype=tf.int64)),
    "random": (lambda x: tf.nn.dropout(x, 0.5), spec(100)),
    "not a number": (lambda x: x * np.nan, spec(4)),
    "refuses every example": (lambda x: normalize(parse(x)), spec(dtype=STRING)),
}  # fmt: skip


@pytest.mark.parametrize("case", DEPENDENT)
def test_dependent_rows_are_found(tmp_path: Path, case: str) -> None:
    assert find(save(tmp_path / "1", *DEPENDENT[case])) == {"serving_default"}


@pytest.mark.parametrize("case", INDEPENDENT)
def test_independent_rows_are_batched(tmp_path: Path, case: str) -> None:
    assert find(save(tmp_path / "1", *INDEPENDENT[case])) == frozenset()


def test_exported_classifiers_are_batched(colours: Path, adder: Path) -> None:
    assert find(colours) == find(adder) == frozenset()


def test_only_the_dependent_signature_is_returned(tmp_path: Path) -> None:
    module = tf.Module()
    signatures = {
        "serving_default": tf.function(lambda x: {"y": 2 * x}, input_signature=[spec(2)]),
        "normalized": tf.function(lambda x: {"y": normalize(x)}, input_signature=[spec(2)]),
    }
    tf.saved_model.save(module, str(tmp_path), signatures=signatures)
    assert find(tmp_path) == {"normalized"}


def test_warm_up_records_are_used_as_examples(tmp_path: Path) -> None:
    save(tmp_path, lambda x: normalize(parse(x)), spec(dtype=STRING, name="images"))
    assert find(tmp_path) == frozenset()
    examples = [
        tf.train.Example(features=tf.train.Features(feature={"v": tf.train.Feature(float_list={"value": [i, i * i]})}))
        for i in range(3)
    ]
    write_warmup_records(tmp_path, [tf.constant([example.SerializeToString()]) for example in examples])
    assert find(tmp_path) == {"serving_default"}


@pytest.mark.timeout(60)
def test_the_check_has_a_time_limit(monkeypatch: pytest.MonkeyPatch, colours: Path) -> None:
    monkeypatch.setattr(row_independence, "TIME_LIMIT_S", 0.2)
    leave = threading.Event()

    class Stuck(SavedModelPredictor):
        def predict(self, *args: Any, **options: Any) -> dict[str, np.ndarray]:
            leave.wait(60)
            return super().predict(*args, **options)

    assert find_dependent_signatures(colours, Stuck(colours)) == frozenset()
    leave.set()


def test_a_model_with_dependent_rows_is_not_batched_and_reported(
    tmp_path: Path, colours: Path, start_server: Callable[..., Server]
) -> None:
    models_dir = tmp_path / "models"
    save(models_dir / "coupled" / "1", lambda x: x - tf.reduce_mean(x, 0, keepdims=True), spec(2))
    shutil.copytree(colours, models_dir / "colours" / "1")
    server = start_server(models_dir)
    server.wait_for("/readyz")

    def predict(number: int) -> Any:
        with httpx.Client() as client:
            url = server.url + "/v1/models/coupled:predict"
            return [client.post(url, json={"instances": [[number, number]]}).json() for _ in range(25)]

    with ThreadPoolExecutor(8) as pool:
        responses = [response for responses in pool.map(predict, range(8)) for response in responses]
    assert responses == [{"predictions": [[0.0, 0.0]]}] * 200
    rows = [[float(i), 0.0] for i in range(100)]  # more than the maximum batch size: not split either
    response = httpx.post(server.url + "/v1/models/coupled:predict", json={"instances": rows}).json()
    assert response["predictions"][0] == [-49.5, 0.0]

    metrics = httpx.get(server.url + "/metrics").text
    assert 'serving_model_version_warning{kind="dependent_rows",model="coupled",version="1"} 1.0' in metrics
    assert 'kind="dependent_rows",model="colours"' not in metrics
    errors = {model["name"]: model["error"] for model in httpx.get(server.url + "/readyz").json()["models"]}
    assert errors["colours"] is None
    assert "rows of a batch influence each other in serving_default" in errors["coupled"]
    (status,) = httpx.get(server.url + "/v1/models/coupled").json()["model_version_status"]
    assert (status["state"], status["status"]["error_code"]) == ("AVAILABLE", "OK")
    assert "never batched" in status["status"]["error_message"]
    assert "coupled version 1: rows of a batch influence each other" in server.log
    assert server.stop() == 0
