"""Small real SavedModels with the signatures of an exported classifier, made without Keras."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

COLOURS = ("red", "green", "blue")
# Of each datatype of the Open Inference Protocol.
DTYPES = {
    "BOOL": tf.bool,
    "UINT8": tf.uint8,
    "UINT16": tf.uint16,
    "UINT32": tf.uint32,
    "UINT64": tf.uint64,
    "INT8": tf.int8,
    "INT16": tf.int16,
    "INT32": tf.int32,
    "INT64": tf.int64,
    "FP16": tf.float16,
    "FP32": tf.float32,
    "FP64": tf.float64,
    "BYTES": tf.string,
}


class ColourClassifier(tf.Module):
    """Tells which colour a picture has most of. With a `gate` it waits, in the graph, for that file."""

    def __init__(self, size: tuple[int, int], gate: Path | None) -> None:
        super().__init__()
        self.sharpness = tf.Variable(0.05)
        self._size = size
        self._gate = gate

    @tf.function
    def classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        images = tf.ensure_shape(images, (None, *self._size, 3))
        if self._gate is not None:
            pattern = tf.constant(str(self._gate))

            # Some rounds even where the gate is open: calls of less than a millisecond the event loop makes itself.
            def is_shut(rounds: tf.Tensor) -> tf.Tensor:
                return (rounds < 100) | (tf.size(tf.io.matching_files(pattern)) == 0)

            with tf.control_dependencies(tf.while_loop(is_shut, lambda rounds: [rounds + 1], [0])):
                images = tf.identity(images)
        colours = tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2))
        probabilities = tf.nn.softmax(colours * self.sharpness)
        class_id = tf.argmax(probabilities, axis=1)
        return {
            "probabilities": probabilities,
            "class_id": class_id,
            "label": tf.gather(tf.constant(COLOURS), class_id),
        }

    @tf.function
    def explain(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Where the picture has most of the colour."""
        images = tf.ensure_shape(images, (None, *self._size, 3))
        class_id = self.classify(images)["class_id"]
        share = tf.gather(tf.cast(images, tf.float32), class_id, axis=3, batch_dims=1) / 255
        return {"heat_map": share, "class_id": class_id}

    def guard(self, outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Call a confident prediction typical, and put every colour above a tenth into the set."""
        confidence = tf.reduce_max(outputs["probabilities"], axis=1)
        limits = {"typicality": confidence, "is_typical": confidence > 0.5, "label_set": outputs["probabilities"] > 0.1}
        return outputs | limits

    @tf.function
    def classify_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        def decode(data: tf.Tensor) -> tf.Tensor:
            image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
            return tf.cast(tf.round(tf.image.resize(image, self._size, antialias=True)), tf.uint8)

        image_bytes = tf.ensure_shape(image_bytes, (None,))
        images = tf.map_fn(decode, image_bytes, fn_output_signature=tf.uint8)
        outputs: dict[str, tf.Tensor] = self.classify(images)
        return outputs


def save_colour_classifier(
    path: Path,
    *,
    size: tuple[int, int] = (32, 32),
    gate: Path | None = None,
    card: bool = True,
    explain: bool = False,
    guarded: bool = False,
) -> Path:
    """Write a classifier of three colours to `path`, with a card and without warm-up records."""
    model = ColourClassifier(size, gate)
    images = tf.TensorSpec((None, *size, 3), tf.uint8, name="images")
    signatures = {
        "serving_default": model.classify.get_concrete_function(images),
        "image_bytes": model.classify_bytes.get_concrete_function(
            tf.TensorSpec((None,), tf.string, name="image_bytes")
        ),
    }
    if explain:
        signatures["explain"] = model.explain.get_concrete_function(images)
    if guarded:
        for name, classify in (("guarded", model.classify), ("guarded_bytes", model.classify_bytes)):
            plain = signatures["serving_default" if name == "guarded" else "image_bytes"]
            (spec,) = plain.structured_input_signature[0]
            function = tf.function(lambda tensor, classify=classify: model.guard(classify(tensor)))
            signatures[name] = function.get_concrete_function(spec)
    tf.saved_model.save(model, str(path), signatures=signatures)
    extra = path / "assets.extra"
    extra.mkdir()
    if card:
        (extra / "model.json").write_text(json.dumps({"class_names": COLOURS}))
    return path


def save_adder(path: Path) -> Path:
    """Write a model that is no picture classifier: two inputs, one of them without a batch."""

    @tf.function(input_signature=[tf.TensorSpec((None, 2), tf.float32, "a"), tf.TensorSpec((None, 2), tf.float32, "b")])
    def add(a: tf.Tensor, b: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"sum": a + b}

    @tf.function(input_signature=[tf.TensorSpec((), tf.string, "text")])
    def shout(text: tf.Tensor) -> dict[str, tf.Tensor]:
        tf.debugging.assert_greater(tf.strings.length(text), 0, message="nothing to shout")
        return {"shouted": tf.strings.upper(text)}

    model = tf.Module()
    tf.saved_model.save(model, str(path), signatures={"serving_default": add, "shout": shout})
    return path


def save_echo(path: Path) -> None:
    """Save a model that returns its inputs, one of every datatype, with more signatures of unusual shapes."""

    @tf.function(input_signature=[tf.TensorSpec((None,), dtype, name) for name, dtype in DTYPES.items()])
    def echo(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: tf.identity(tensor) for name, tensor in zip(DTYPES, tensors, strict=True)}

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, "x")])
    def logarithm(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.math.log(x), "rank": tf.rank(x)}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.complex64, "z")])
    def real(z: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"x": tf.math.real(z)}

    signatures = {"serving_default": echo, "logarithm": logarithm, "real": real}
    tf.saved_model.save(tf.Module(), str(path), signatures=signatures)


def save_multiplier(path: Path) -> Path:
    """Write a model with an input that has a default value: k times x, and 3 times x without k."""

    three = tf.constant(3.0)
    specs = [tf.TensorSpec((None,), tf.float32, "x"), tf.TensorSpec((), tf.float32, "k")]
    model = tf.Module()
    model.multiply = tf.function(lambda x, k=three: {"y": k * x}, input_signature=specs)
    tf.saved_model.save(model, str(path), signatures=model.multiply)
    return path


def write_warmup_records(
    path: Path, batches: Sequence[tf.Tensor], *, name: str = "images", signature: str = "serving_default"
) -> None:
    """Write a warm-up record with the one input `name` for each of `batches`."""
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for batch in batches:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "colours"
            request.model_spec.signature_name = signature
            request.inputs[name].CopyFrom(tf.make_tensor_proto(batch))
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString())
