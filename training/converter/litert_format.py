"""LiteRT (formerly TensorFlow Lite): conversion by TensorFlow, execution by the LiteRT interpreter."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from training.converter.pixel_signature import SIGNATURE, PixelSignature
from training.errors import ExportError


def convert(signature: PixelSignature, model_info: str) -> bytes:
    """Return a LiteRT model with the signature's names, and `model_info` attached as `model.json`.

    An attached file is a zip archive behind the model, as in TensorFlow Lite's metadata: interpreters ignore it.

    Raises:
        ExportError: an operation has no equivalent; the message names it.
    """
    with tempfile.TemporaryDirectory() as folder:
        function = signature.function.get_concrete_function()
        # TensorFlow cannot save the gradients that some activations, such as swish, define for a frozen graph.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(tf.Module(), folder, {SIGNATURE: function}, options)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[SIGNATURE])
        try:
            model: bytes = converter.convert()
        except Exception as error:
            # Of TensorFlow's ConverterError, a class that it does not export.
            operations = {data.operator.name.removeprefix("tf.") for data in getattr(error, "errors", ())} - {""}
            if not operations:
                raise
            raise ExportError(f"LiteRT has no equivalent of {', '.join(sorted(operations))}") from error
    content = io.BytesIO(model)
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(zipfile.ZipInfo("model.json"), model_info)  # without a time: equal models are equal files
    return content.getvalue()


def load(content: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return the function of images that a model computes in the LiteRT interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=content).get_signature_runner(SIGNATURE)
    (name,) = runner.get_input_details()
    return lambda images: runner(**{name: images})
