"""What a model says of itself: `assets.extra/model.json`, and the names of its classes by its signature `labels`.

It is shown, and never needed to serve the model.
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.inference.model_config import printable
from serving.inference.signatures import DEFAULT_SIGNATURE, Predictor

logger = logging.getLogger(__name__)

INFO_FILE = Path("assets.extra", "model.json")
MAX_INFO_BYTES = 16 * 1024 * 1024
MAX_CLASSES = 100_000
LABELS_SIGNATURE = "labels"  # class_id to label, in the models that this project exports


@dataclass(frozen=True)
class ModelInfo:
    """What `model.json` says that this service shows, and what is wrong with the file.

    `content` has `class_names` (different strings), `dataset.name` and `test.accuracy` (0 to 1), as far as they are
    given; it is None where there is no file, or none that can be read. `problem` is a sentence, or empty.
    """

    content: dict[str, Any] | None
    problem: str = ""


def read_model_info(path: Path) -> ModelInfo:
    """Read `assets.extra/model.json` of a version, whatever is in it."""
    file = path / INFO_FILE
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # to open a pipe would wait for a writer
            return ModelInfo(None, f"{file} is not a regular file")
        with file.open("rb") as stream:
            text = stream.read(MAX_INFO_BYTES + 1)
        if len(text) > MAX_INFO_BYTES:
            return ModelInfo(None, f"{file} is larger than {MAX_INFO_BYTES:,} bytes")
        document = json.loads(text)
    except FileNotFoundError:
        return ModelInfo(None)
    except OSError as error:
        return ModelInfo(None, f"{file} cannot be read: {error.strerror or error}")
    except RecursionError:
        return ModelInfo(None, f"{file} is nested too deeply")
    except (ValueError, MemoryError) as error:
        return ModelInfo(None, f"{file} is not valid JSON: {error}")
    if not isinstance(document, dict):
        return ModelInfo(None, f"{file} must hold a JSON object")
    info: dict[str, Any] = {}
    problems = []
    for read in (_read_class_names, _read_dataset, _read_accuracy):
        try:
            info.update(read(document))
        except ValueError as error:
            problems.append(str(error))
    return ModelInfo(info, f"{file}: {'; '.join(problems)}" if problems else "")


def _read_class_names(document: Mapping[str, Any]) -> dict[str, Any]:
    names = document.get("class_names")
    if names is None:
        return {}
    if not isinstance(names, list) or not all(isinstance(n, str | int) and not isinstance(n, bool) for n in names):
        raise ValueError("class_names must be a list of strings")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"class_names must have at most {MAX_CLASSES:,} entries")
    names = [printable(str(name)) for name in names]
    if len(set(names)) < len(names):
        raise ValueError("class_names must differ from each other")
    return {"class_names": names}


def _read_dataset(document: Mapping[str, Any]) -> dict[str, Any]:
    name = _read_member(document, "dataset", "name")
    if name is None:
        return {}
    if not isinstance(name, str):
        raise ValueError("dataset.name must be a string")
    return {"dataset": {"name": printable(name)}}


def _read_accuracy(document: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = _read_member(document, "test", "accuracy")
    if accuracy is None:
        return {}
    if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
        raise ValueError("test.accuracy must be a number from 0 to 1")
    return {"test": {"accuracy": float(accuracy)}}


def _read_member(document: Mapping[str, Any], key: str, member: str) -> Any:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object")
    return None if value is None else value.get(member)


def read_label_names(predictor: Predictor) -> list[str] | None:
    """Ask a model for the names of its classes; None where it has no signature `labels`, or that fails."""
    default = predictor.signatures.get(DEFAULT_SIGNATURE)
    lookup = predictor.signatures.get(LABELS_SIGNATURE)
    shape = default.outputs["probabilities"].shape if default and "probabilities" in default.outputs else None
    if not lookup or lookup.inputs.keys() != {"class_id"} or "label" not in lookup.outputs:
        return None
    if not shape or shape[-1] is None or shape[-1] > MAX_CLASSES:
        return None
    try:
        class_ids = np.arange(shape[-1], dtype=lookup.inputs["class_id"].numpy_dtype)
        labels = predictor.predict(LABELS_SIGNATURE, {"class_id": class_ids})["label"]
        names = [label.decode("utf-8", "replace") for label in labels.tolist()]
    except Exception as error:  # whatever this signature does, the others can be served
        logger.warning("the labels of the classes cannot be read, so their numbers are shown: %s", error)
        return None
    return names
