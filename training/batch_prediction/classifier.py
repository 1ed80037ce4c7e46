"""An exported image classifier in a TensorFlow session, as the service runs it. Imports no Keras."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.errors import PredictionError
from training.native_output import discard_stderr

GUARD_OUTPUTS = ("typicality", "is_typical", "label_set")
# The service prefers the same signatures: with the limits of a prediction, if the model has them.
_PIXELS = ("guarded", "serving_default")
_FILES = ("guarded_bytes", "image_bytes")
_ROWS = 4
_TOLERANCE = 1e-3  # of probabilities; batches of different sizes are rounded differently

Outputs = dict[str, np.ndarray]


class InvalidFilesError(Exception):
    """The model cannot decode one of the files."""


class Classifier:
    """An exported image classifier. Threads may call it at the same time; each call uses one core.

    Args:
        version: the folder of the SavedModel.

    Attributes:
        image_size: (height, width) of its images.
        class_names: a label for each class, their numbers where the model does not name them.
        has_guard: whether it tells the limits of a prediction.
        decodes_files: whether it has a signature that takes PNG files.

    Raises:
        PredictionError: it cannot be loaded, or is not an image classifier.
    """

    def __init__(self, version: Path) -> None:
        import tensorflow as tf
        from tensorflow.core.protobuf import config_pb2

        self._version = version
        # One thread for each call, and calls at the same time: faster than several threads for each, and the results do
        # not depend on their number.
        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=1, inter_op_parallelism_threads=-1, use_per_session_threads=True
        )
        graph = tf.Graph()
        with discard_stderr():  # the first session of a process writes there at any log level
            self._session = tf.compat.v1.Session(graph=graph, config=config)
            try:
                with graph.as_default():
                    loaded = tf.compat.v1.saved_model.load(self._session, ["serve"], str(version))
            except Exception as error:  # a damaged graph can raise any type of error
                self._session.close()
                raise PredictionError(f"{version} cannot be loaded: {_first_line(error)}") from error
        self._signatures = dict(loaded.signature_def)
        self._options = config_pb2.RunOptions(inter_op_thread_pool=-1)  # in the calling thread
        self.image_size = self._find_image_size()
        self._pixels = self._bind(_PIXELS, "images")
        self._files = self._bind(_FILES, "image_bytes")
        assert self._pixels is not None  # `serving_default`
        self.has_guard = all(name in self._pixels[1] for name in GUARD_OUTPUTS)
        # The first call of a signature takes long, as TensorFlow then optimizes its graph.
        probabilities = self.classify(np.zeros((1, *self.image_size, 3), np.uint8))["probabilities"]
        self.decodes_files = self._can_decode()
        if probabilities.ndim != 2:
            raise self._not_a_classifier()
        self.class_names = _read_class_names(version, count=probabilities.shape[1])

    def classify(self, images: np.ndarray) -> Outputs:
        """Classify pixels.

        Args:
            images: uint8 (n, height, width, 3), n from 1.

        Returns:
            `probabilities` float32 (n, classes) and the other outputs of the signature.

        Raises:
            PredictionError: the model fails.
        """
        import tensorflow as tf

        try:
            return self._call(self._pixels, images)
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise PredictionError(
                f"not enough memory for {len(images)} images in a call: lower --batch-size or --jobs"
            ) from error
        except tf.errors.OpError as error:
            raise PredictionError(f"{self._version} fails: {_first_line(error)}") from error

    def classify_files(self, files: list[bytes]) -> Outputs:
        """Classify PNG files of the model's image size, decoded by the model.

        Returns:
            As for `classify`.

        Raises:
            InvalidFilesError: one of them is damaged.
        """
        import tensorflow as tf

        try:
            return self._call(self._files, np.array(files, object))
        except tf.errors.OpError as error:
            raise InvalidFilesError from error

    def check_rows_independent(self) -> None:
        """Raise `PredictionError` if the prediction of an image depends on the other images of its batch."""
        rng = np.random.default_rng(0)
        limits = np.linspace(64, 256, _ROWS).reshape(-1, 1, 1, 1)  # images of different brightness
        images = np.asarray(rng.random((_ROWS, *self.image_size, 3)) * limits).astype(np.uint8)
        together = self.classify(images)["probabilities"]
        alone = np.concatenate([self.classify(images[row : row + 1])["probabilities"] for row in range(_ROWS)])
        if together.shape != alone.shape or not np.allclose(together, alone, rtol=0, atol=_TOLERANCE, equal_nan=True):
            raise PredictionError(
                f"the predictions of {self._version} depend on the other images of a batch, as with batch statistics: "
                "predict one by one, with --batch-size 1"
            )

    def _can_decode(self) -> bool:
        pixels, files = self._pixels, self._files
        if pixels is None or files is None or set(pixels[1]) != set(files[1]):  # one result has the same columns
            return False
        file = io.BytesIO()
        Image.new("RGB", self.image_size[::-1]).save(file, "PNG")
        try:
            self.classify_files([file.getvalue()])
        except InvalidFilesError:
            return False
        return True

    def _call(self, bound: Any, batch: np.ndarray) -> Outputs:
        run, names = bound
        return dict(zip(names, run(batch, options=self._options), strict=True))

    def _bind(self, candidates: tuple[str, ...], input_name: str) -> tuple[Any, tuple[str, ...]] | None:
        """Return a function of a batch and the names of its results, from the first of these signatures that fits."""
        wanted = ("probabilities", "class_id", "label", *GUARD_OUTPUTS)
        for candidate in candidates:
            signature = self._signatures.get(candidate)
            if signature is None or set(signature.inputs) != {input_name} or "probabilities" not in signature.outputs:
                continue
            outputs = {name: signature.outputs[name].name for name in wanted if name in signature.outputs}
            feed = [signature.inputs[input_name].name]
            run = self._session.make_callable(list(outputs.values()), feed_list=feed, accept_options=True)
            return run, tuple(outputs)
        return None

    def _find_image_size(self) -> tuple[int, int]:
        import tensorflow as tf

        signature = self._signatures.get("serving_default")
        if signature and set(signature.inputs) == {"images"} and "probabilities" in signature.outputs:
            images = signature.inputs["images"]
            shape = tf.TensorShape(images.tensor_shape)
            if images.dtype == tf.uint8.as_datatype_enum and shape.rank == 4 and None not in shape[1:].as_list():
                height, width, channels = shape[1:].as_list()
                if channels == 3:
                    return height, width
        raise self._not_a_classifier()

    def _not_a_classifier(self) -> PredictionError:
        return PredictionError(
            f"{self._version} is not an image classifier: expected a signature serving_default from images (uint8 (n, "
            "height, width, 3)) to probabilities (n, classes). Name a model that this program has exported"
        )


def read_labels(outputs: Mapping[str, np.ndarray], class_names: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """Return the most probable class of each image: class ids, int64 (n,), and labels.

    Unless the model returns both, the probabilities decide, as in the service.
    """
    if "class_id" in outputs and "label" in outputs:
        return outputs["class_id"], [label.decode("utf-8", "replace") for label in outputs["label"].tolist()]
    class_ids = outputs["probabilities"].argmax(axis=1)
    return class_ids, [class_names[class_id] for class_id in class_ids.tolist()]


def _read_class_names(version: Path, *, count: int) -> tuple[str, ...]:
    try:
        names = json.loads((version / "assets.extra" / "model.json").read_text(encoding="utf-8"))["class_names"]
        if isinstance(names, list) and len(names) == count:
            return tuple(map(str, names))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the model info is optional
    return tuple(map(str, range(count)))


def _first_line(error: Exception) -> str:
    return (str(getattr(error, "message", None) or error).splitlines() or [repr(error)])[0]
