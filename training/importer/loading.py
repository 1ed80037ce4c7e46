"""Reads a model: a `.keras` or `.h5` file, a SavedModel, a Keras model, or a callable."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from training.errors import ModelError

_FORMATS = "Give a .keras or .h5 file written by model.save, or a SavedModel's folder written by model.export"
_HDF5_START = b"\x89HDF\r\n\x1a\n"
# Keras's messages about classes and functions that it does not know.
_UNKNOWN_OBJECT = re.compile(r"(?:Could not locate|Unknown) (?:class|function|[\w ]+):? ['\"]([^'\"]+)['\"]")


@dataclass(frozen=True)
class InputTensor:
    """An input that a model declares: its name, shape with the batch axis (`None`: any size), and dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as it was given.

    Attributes:
        call: computes the outputs in inference mode: a tensor, or a list or dict of them.
        inputs: what it declares; `None` if it declares nothing.
        layers: its Keras layers, nested ones too; empty if they are unknown.
        output_names: of a model that returns a list.
        description: for messages.
        name: default name of the exported model.
    """

    call: Callable[[tf.Tensor], Any]
    inputs: tuple[InputTensor, ...] | None
    layers: tuple[Any, ...] = ()
    output_names: tuple[str, ...] = ()
    description: str
    name: str


def load_source(given: Any, *, custom: Path | None = None) -> Source:
    """Load a model.

    Args:
        given: the path of a file or folder, a Keras model or layer, or a function of a batch of images.
        custom: a Python file with the model's own classes and functions; it is executed.

    Raises:
        ModelError: it cannot be loaded; the message says what is missing.
    """
    custom_objects = _execute(custom) if custom else {}
    if isinstance(given, str | Path):
        return _load_path(Path(given), custom_objects, custom)
    if isinstance(given, keras.layers.Layer):
        return _wrap_layer(given, description=f"{type(given).__name__} {given.name!r}", name=given.name)
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return Source(call=given, inputs=_read_signature(given), description=f"the function {name}", name=name)
    raise ModelError(f"expected a model, its path, or a function of a batch of images; got {type(given).__name__}")


def _load_path(path: Path, custom_objects: Mapping[str, Any], custom: Path | None) -> Source:
    if not path.exists():
        raise ModelError(f"{path} does not exist. {_FORMATS}")
    if path.is_dir() and not (path / "metadata.json").is_file():
        return _load_saved_model(path)
    suffix = path.suffix.lower()
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(8)
        kind = ".keras" if zipfile.is_zipfile(path) else ".h5" if start == _HDF5_START else ""
        if not kind:
            raise ModelError(f"{path} is not a Keras model: it is neither a zip archive nor an HDF5 file. {_FORMATS}")
        if kind != suffix and (kind, suffix) != (".h5", ".hdf5"):
            raise ModelError(f"{path} has the content of a {kind} file: rename it to {path.with_suffix(kind).name}")
    try:
        model = keras.saving.load_model(path, custom_objects=dict(custom_objects), compile=False)
    except Exception as error:  # a saved model may raise anything
        raise ModelError(_explain(path, error, custom)) from error
    return _wrap_layer(model, description=f"{path} ({_style(model)})", name=path.stem)


def _style(model: Any) -> str:
    name = type(model).__name__
    return name if isinstance(model, keras.Sequential) or name == "Functional" else f"subclassed model {name}"


def _wrap_layer(layer: Any, *, description: str, name: str) -> Source:
    if isinstance(layer, keras.Model) and not layer.built:
        raise ModelError(
            f"{description} was never built, so it has no weights. Call it once on a batch of images, or load its "
            "weights, before you export it"
        )
    layers = tuple(layer._flatten_layers()) if isinstance(layer, keras.layers.Layer) else ()
    return Source(
        call=lambda images: layer(images, training=False),
        inputs=_read_inputs(layer),
        layers=layers,
        output_names=tuple(getattr(layer, "output_names", ()) or ()),
        description=description,
        name=name,
    )


def _read_inputs(layer: Any) -> tuple[InputTensor, ...] | None:
    """Return the inputs of a Keras model or layer: its symbolic ones, or the shape that it was built with."""
    try:
        symbolic = list(layer.inputs)
    except (AttributeError, ValueError):
        symbolic = []
    if symbolic:
        return tuple(InputTensor(tensor.name, tuple(tensor.shape), _dtype(tensor.dtype)) for tensor in symbolic)
    if endpoint := getattr(layer, "call_endpoint_fn", None):  # of a TFSMLayer
        return _read_signature(endpoint)
    config = layer.get_build_config() or {}
    shapes = [config["input_shape"]] if "input_shape" in config else list(config.get("shapes_dict", {}).values())
    if not shapes or not isinstance(shapes[0], list | tuple):
        return None
    if isinstance(shapes[0][0], list | tuple):
        shapes = list(shapes[0])
    # The batch that a subclass was built with is not a limit.
    return tuple(InputTensor(f"input {n}", (None, *shape[1:]), "float32") for n, shape in enumerate(shapes, 1))


def _read_signature(function: Any) -> tuple[InputTensor, ...] | None:
    """Return the inputs of a concrete function, or of a `tf.function` with one trace or an input signature."""
    if concrete := getattr(function, "concrete_functions", None):
        function = concrete[0]
    signature: Any = getattr(function, "structured_input_signature", None) or getattr(function, "input_signature", ())
    specs = [spec for spec in tf.nest.flatten(signature) if isinstance(spec, tf.TensorSpec)]
    if not specs or any(spec.shape.rank is None for spec in specs):
        return None
    return tuple(InputTensor(spec.name or "input", tuple(spec.shape), spec.dtype.name) for spec in specs)


def _dtype(dtype: Any) -> str:
    return str(tf.as_dtype(dtype).name)


def _load_saved_model(path: Path) -> Source:
    if not (path / "saved_model.pb").is_file():
        inner = sorted(child.name for child in path.iterdir() if (child / "saved_model.pb").is_file())
        advice = f"It contains the SavedModels {', '.join(inner)}: name one of them" if inner else _FORMATS
        raise ModelError(f"{path} is a folder without saved_model.pb. {advice}")
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # a damaged one may raise anything
        raise ModelError(f"{path} cannot be loaded as a SavedModel: {_first_line(error)}") from error
    signatures = dict(loaded.signatures)
    if {"image_bytes", "labels", "serving_default"} <= signatures.keys():
        raise ModelError(
            f"{path} was exported by this program already: copy the folder to MODELS_DIR/NAME/VERSION to serve it"
        )
    names = [name for name in ("serving_default", "serve") if name in signatures] or list(signatures)
    if not names or (len(names) > 1 and names[0] not in ("serving_default", "serve")):
        raise ModelError(
            f"{path} has {'the signatures ' + ', '.join(names) if names else 'no signatures'}; expected "
            "serving_default or serve, which model.export writes"
        )
    signature = signatures[names[0]]
    inputs = _read_signature(signature)
    keyword = inputs[0].name if inputs else ""

    def call(images: tf.Tensor) -> Any:
        assert loaded is not None  # it owns the variables, which the signature only refers to
        return signature(**{keyword: images})

    folder = path.resolve()
    name = folder.parent.name if folder.name.isdecimal() else folder.name
    return Source(call=call, inputs=inputs, description=f"{path} (SavedModel, signature {names[0]})", name=name)


def _execute(path: Path) -> dict[str, Any]:
    """Execute a Python file; return the classes and functions that it defines."""
    if not path.is_file():
        raise ModelError(
            f"--custom {path} is not a file: name a Python file with the model's own classes and functions"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"--custom {path} is not a Python file: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as for a script, which may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"--custom {path} fails: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    }


def _explain(path: Path, error: Exception, custom: Path | None) -> str:
    text = str(error)
    if "safe_mode" in text:  # Keras names the parameter that would execute the code
        trust = (
            "If you trust the file, load it in Python with keras.saving.load_model(..., safe_mode=False), and call "
            "training.export(model)"
        )
        if "TFSMLayer" in text:
            return (
                f"{path} contains a TFSMLayer, which loads another SavedModel, and that may contain code. Import the "
                f"folder of the SavedModel itself. {trust}"
            )
        return (
            f"{path} contains a Lambda layer, which is Python code inside the file, and code from a model file is not "
            f"executed. Write a layer class instead, save the model again, and give its file with --custom. {trust}"
        )
    if unknown := _UNKNOWN_OBJECT.search(text):
        where = f"{custom} does not define it" if custom else "its code is not in the file"
        return (
            f"{path} uses {unknown[1]!r}, and {where}. Give the Python file that defines it with --custom module.py; "
            "the file is executed"
        )
    if "No model config found" in text:
        return f"{path} has weights without a model: save the whole model with model.save, not model.save_weights"
    return f"{path} cannot be loaded{_saved_by(path)}: {type(error).__name__}: {_first_line(error)}"


def _saved_by(path: Path) -> str:
    """Return which Keras wrote a file, if it is another one."""
    try:
        with zipfile.ZipFile(path) as archive:
            version = json.loads(archive.read("metadata.json"))["keras_version"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, TypeError):
        return ""
    return f" by Keras {keras.__version__}; Keras {version} wrote it" if version != keras.__version__ else ""


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
