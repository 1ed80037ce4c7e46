"""In-process backend: loads a SavedModel and runs its signatures with TensorFlow.

TensorFlow is imported lazily, so that only the server process pays for it.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import InvalidRequest, ModelFailed, ModelLoadError, ServingError, deadline_exceeded
from serving.inference.signatures import Signature, TensorSpec, check_inputs
from serving.quoting import hide_paths


class SavedModelPredictor:
    """Predictor for a SavedModel in this process.

    Args:
        path: the version's folder, with `saved_model.pb` or `saved_model.pbtxt`.
        intra_op_threads: TensorFlow's threads per call. The first predictor sets it for the whole process.

    Raises:
        ModelLoadError: the SavedModel is missing or cannot be loaded.
    """

    def __init__(self, path: Path, *, intra_op_threads: int = 1) -> None:
        self.signatures: Mapping[str, Signature] = read_signatures(path)
        config = start_tensorflow(intra_op_threads)
        import tensorflow as tf

        # TensorFlow Serving also loads into a Session, so the same broken exports fail here. A call takes two thirds
        # of the time of a `tf.saved_model.load` function.
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default():
                tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
            self._callables = {name: self._make_callable(signature) for name, signature in self.signatures.items()}
        except Exception as error:  # a damaged graph can raise any type of error
            self._session.close()
            if isinstance(error, MemoryError):
                raise ModelLoadError(f"not enough memory to load {path}", code="RESOURCE_EXHAUSTED") from error
            code = _error_code(error) if isinstance(error, tf.errors.OpError) else "UNKNOWN"
            raise ModelLoadError(f"cannot load {path}: {_error_message(error)}", code=code) from error

    def _make_callable(self, signature: Signature) -> Callable[..., list[Any]] | None:
        if not signature.inputs or not signature.outputs:
            return None  # an initializer
        from tensorflow.core.protobuf import config_pb2

        options = config_pb2.CallableOptions(
            feed=[spec.tensor_name for spec in signature.inputs.values()],
            fetch=[spec.tensor_name for spec in signature.outputs.values()],
            run_options=config_pb2.RunOptions(inter_op_thread_pool=-1),  # in the calling thread
        )
        # Private API: with feeds, the public `Session.make_callable` takes as long again as a small model.
        run: Callable[..., list[Any]] = self._session._make_callable_from_options(options)
        return run

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        """See `Predictor.predict`.

        The deadline is checked only before the call: a running TensorFlow call cannot be cancelled.
        """
        run = self._callables.get(signature)
        if run is None:
            raise InvalidRequest(f'Serving signature name: "{signature}" not found in signature def')
        described = self.signatures[signature]
        check_inputs(described, inputs)
        if deadline_s is not None and time.monotonic() >= deadline_s:
            raise deadline_exceeded()
        import tensorflow as tf

        try:
            outputs = run(*(inputs[name] for name in described.inputs))
        except tf.errors.OpError as error:
            raise _to_serving_error(error) from error
        except (TypeError, ValueError) as error:  # an object array with elements that are not bytes
            raise InvalidRequest(hide_paths(_error_message(error))) from error
        # asarray: TensorFlow returns a scalar tensor as a scalar, or as bytes for a string.
        return {
            name: np.asarray(output, dtype=spec.numpy_dtype)
            for (name, spec), output in zip(described.outputs.items(), outputs, strict=True)
        }


@cache
def start_tensorflow(intra_op_threads: int) -> Any:
    """Import TensorFlow and configure its threads; returns the ConfigProto for all sessions.

    The first session of a process sets the number of intra-op threads, and writes a message about an optimization to
    stderr at any log level. It is created here, with stderr redirected.
    """
    import tensorflow as tf

    # Without this, each garbage collection spends a tenth of a second on TensorFlow's permanent objects.
    gc.freeze()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # hides the deprecation warnings about sessions
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=intra_op_threads,
        inter_op_parallelism_threads=-1,  # in the calling thread: handing over costs more than it gains
        use_per_session_threads=True,
    )
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
            session.run(tf.constant(0))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    return config


def read_signatures(path: Path) -> dict[str, Signature]:
    """Read the SignatureDefs of a SavedModel from the graph with the single tag "serve".

    Raises:
        ModelLoadError: the SavedModel is missing or damaged, or has no graph with that tag.
    """
    file = path / "saved_model.pb"
    if not file.exists() and (text_file := path / "saved_model.pbtxt").exists():
        file = text_file
    saved_model = _read_saved_model(file)
    # TensorFlow's loader selects the same graph. Others may be for an accelerator ("serve", "gpu") or for training.
    tag_sets = [set(graph.meta_info_def.tags) for graph in saved_model.meta_graphs]
    if {"serve"} not in tag_sets:
        others = ", ".join(" and ".join(f'"{tag}"' for tag in sorted(tags)) or "nothing" for tags in tag_sets)
        found = f"; its graphs are tagged {others}" if others else ""
        raise ModelLoadError(f'{file} has no graph with the single tag "serve"{found}', code="NOT_FOUND")
    try:
        return read_signature_defs(saved_model.meta_graphs[tag_sets.index({"serve"})].signature_def)
    except (TypeError, ValueError) as error:
        raise ModelLoadError(f"{file}: {error}", code="INVALID_ARGUMENT") from error


def _read_saved_model(file: Path) -> Any:
    from google.protobuf import text_format
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    try:
        if file.exists() and not file.is_file():
            raise ModelLoadError(f"{file} is not a regular file", code="FAILED_PRECONDITION")
        if file.suffix == ".pbtxt":
            return text_format.Parse(file.read_text(encoding="utf-8"), saved_model_pb2.SavedModel())
        return saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelLoadError(f"no saved_model.pb or saved_model.pbtxt in {file.parent}", code="NOT_FOUND") from error
    except OSError as error:
        raise ModelLoadError(f"cannot read {file}: {error.strerror}", code="UNKNOWN") from error
    except DecodeError as error:
        raise ModelLoadError(f"Can't parse {file} as binary proto", code="DATA_LOSS") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"Can't parse {file} as text proto: {error}", code="DATA_LOSS") from error


def read_signature_defs(definitions: Mapping[str, Any]) -> dict[str, Signature]:
    """Convert SignatureDef messages of a saved_model.pb or of a server's metadata.

    Raises:
        ValueError: an input or output has an unknown dtype.
        TypeError, ValueError: a default value cannot be read.
    """
    import tensorflow as tf
    from tensorflow.core.framework import types_pb2

    def describe(signature: str, key: str, tensor: Any) -> TensorSpec:
        shape = tensor.tensor_shape
        if tensor.dtype not in types_pb2.DataType.values():
            raise ValueError(f'signature "{signature}": {key} has the unknown dtype {tensor.dtype}')
        return TensorSpec(
            name=key,
            dtype=types_pb2.DataType.Name(tensor.dtype),
            shape=None if shape.unknown_rank else tuple(None if axis.size < 0 else axis.size for axis in shape.dim),
            tensor_name=tensor.name,
        )

    return {
        name: Signature(
            name=name,
            method_name=definition.method_name,
            inputs={key: describe(name, key, tensor) for key, tensor in sorted(definition.inputs.items())},
            outputs={key: describe(name, key, tensor) for key, tensor in sorted(definition.outputs.items())},
            defaults={
                key: tf.make_ndarray(tensor)
                for key, tensor in sorted(definition.defaults.items())
                if key in definition.inputs
            },
        )
        for name, definition in sorted(definitions.items())
    }


def _to_serving_error(error: Any) -> ServingError:
    message, code = hide_paths(_error_message(error)), _error_code(error)
    if code == "INVALID_ARGUMENT" or message.startswith("Unsupported object type"):  # an element that is not bytes
        return InvalidRequest(message)
    return ModelFailed(message, code=code)


def _error_code(error: Any) -> str:
    """Return the status code of a TensorFlow exception: NotFoundError -> NOT_FOUND."""
    if not type(error).__name__.endswith("Error") or type(error).__name__ == "OpError":
        return "UNKNOWN"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).upper()


# Lines that TensorFlow prints before the reason: the wrapper, one block per node, the number of root errors.
_PREAMBLE = re.compile(r'Graph execution error:|Detected at node |<stack traces unavailable>| +File "|\d+ root error|$')


def _error_message(error: Exception) -> str:
    """Return the line of a TensorFlow error that states the reason."""
    if isinstance(error, UnicodeDecodeError):  # TensorFlow's message quotes bytes of the request
        text = bytes(error.object).decode("utf-8", "backslashreplace")
    else:
        text = str(getattr(error, "message", None) or error)
    lines = text.splitlines()
    line = next((line for line in lines if not _PREAMBLE.match(line)), "no reason given")
    line = re.sub(r"^\s*\(0\) [A-Z_]+:|\{\{[^}]*\}\}| \[Op:[^]]*\]", "", line)
    return line.strip() or "no reason given"
