"""Converts an exported model for another runtime, verifies the result, and writes it as one file."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.errors import ExportError
from training.exporter.versions import find_version
from training.native_output import discard_stderr
from training.storage import explain_full_storage, make_folder, write_file

if TYPE_CHECKING:
    from training.converter.pixel_signature import PixelSignature


@dataclass(frozen=True)
class Format:
    """A file format of another runtime.

    Attributes:
        title: in messages.
        suffix: of its files.
        packages: what converts a model and runs it, as they are imported.
        module: has `convert(signature, model_info)`, the content of a file, and `load(content)`, a function of images.
    """

    title: str
    suffix: str
    packages: tuple[str, ...]
    module: str


FORMATS = {
    "onnx": Format("ONNX", ".onnx", ("tf2onnx", "onnxruntime"), "training.converter.onnx_format"),
    "litert": Format("LiteRT", ".tflite", ("ai_edge_litert",), "training.converter.litert_format"),
}


def convert_model(model: Path, *, to: str, output: Path | None = None) -> Path:
    """Convert the signature `serving_default` of an exported model, and verify the result as an export is verified.

    Args:
        model: the folder of a version, `models/NAME/VERSION`, or `models/NAME` for its newest version.
        to: a key of `FORMATS`.
        output: the file to write; by default `models/NAME/NAME-VERSION` with the format's suffix.

    Returns:
        The file. It has the version's model.json inside.

    Raises:
        ExportError: there is no such model, packages are missing, an operation cannot be converted, or the outputs of
            the result differ from the exported model's. Nothing is written then.
        StorageFullError: the disk is full.
    """
    form = FORMATS[to]
    version = find_version(model)
    model_info, class_names = _read_model_info(version)
    _check_packages(form)
    output = output or version.parent / f"{version.parent.name}-{version.name}{form.suffix}"

    from training.converter.pixel_signature import read_pixel_signature

    # TensorFlow's converters log to the process's stderr at every log level.
    with explain_full_storage(output, "Nothing was written: free some space, then convert again"):
        with discard_stderr():
            signature = read_pixel_signature(version)
            content = _convert(signature, form, model_info, version=version)
            _verify(content, signature, form, class_names=class_names)
        make_folder(output.parent)
        write_file(output, content)
    return output


def _read_model_info(version: Path) -> tuple[str, tuple[str, ...]]:
    """Return the text of model.json and the class names in it."""
    path = version / "assets.extra" / "model.json"
    try:
        text = path.read_text()
        return text, tuple(json.loads(text)["class_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{version} cannot be converted: its class names cannot be read from {path} ({error!r}). Convert a version "
            "that this program has exported"
        ) from error


def _check_packages(form: Format) -> None:
    missing = [name for name in form.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"conversion to {form.title} needs packages that are not installed: {', '.join(missing)}. In the project's "
            f"folder: {sys.executable} -m pip install '.[convert]'"
        )


def _convert(signature: PixelSignature, form: Format, model_info: str, *, version: Path) -> bytes:
    try:
        content: bytes = import_module(form.module).convert(signature, model_info)
    except Exception as error:  # converters raise various errors for unsupported graphs
        reason = error if isinstance(error, ExportError) else f"its converter fails: {_first_line(error).rstrip('.')}"
        raise ExportError(
            f"{version} cannot be converted to {form.title}: {reason}. Serve it as it is, or change the network"
        ) from error
    return content


def _verify(content: bytes, signature: PixelSignature, form: Format, *, class_names: tuple[str, ...]) -> None:
    """Compare the converted model, at every batch size of an export, with the logits of the exported one."""
    from training.exporter.comparison import compare_outputs
    from training.exporter.saved_model import example_images
    from training.exporter.verify import BATCH_SIZES

    labels = np.array([name.encode() for name in class_names], object)
    run: Any = None
    for batch_size in BATCH_SIZES:
        where = f"the converted {form.title} model, at batch size {batch_size},"
        images = example_images(batch_size, signature.input_shape)
        try:
            run = run or import_module(form.module).load(content)
            outputs = run(images)
        except Exception as error:  # each runtime has classes of its own
            raise ExportError(f"{where} fails: {_first_line(error)}") from error
        class_ids = outputs.get("class_id", outputs["probabilities"].argmax(axis=1))
        completed = {**outputs, "class_id": class_ids, "label": labels[class_ids]}
        compare_outputs(completed, signature.logits(images), class_names, where=where)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
