"""Model info: `assets.extra/model.json`, and the class names from the signature `labels`. Both are optional."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import ModelLoadError
from serving.inference.signatures import DEFAULT_SIGNATURE, Predictor
from serving.inference.version_files import read_file
from serving.quoting import printable

logger = logging.getLogger(__name__)

INFO_FILE = Path("assets.extra", "model.json")
MAX_INFO_BYTES = 16 * 1024 * 1024
MAX_CLASSES = 100_000
LABELS_SIGNATURE = "labels"  # maps class_id to label in the models that this project exports


@dataclass(frozen=True)
class Reference:
    """Predictions on the validation images: what those in service are compared with."""

    images: int
    class_shares: tuple[float, ...]  # in the order of the class ids; they sum to 1
    mean_confidence: float
    mean_typicality: float


@dataclass(frozen=True)
class ModelInfo:
    """The fields of a model's `model.json` that the service shows."""

    class_names: tuple[str, ...] = ()  # unique, in the order of the class ids; empty if unknown
    dataset: str | None = None  # name of the training dataset
    test_accuracy: float | None = None  # from 0 to 1
    reference: Reference | None = None


def read_model_info(path: Path) -> tuple[ModelInfo, str]:
    """Read `assets.extra/model.json` of a version.

    Returns:
        The valid fields, and an error message or "". An invalid file does not prevent a model from being served.
    """
    file = path / INFO_FILE
    info = ModelInfo()
    try:
        document = json.loads(read_file(file, max_bytes=MAX_INFO_BYTES))
    except ModelLoadError as error:
        return info, "" if isinstance(error.__cause__, FileNotFoundError) else str(error)
    except RecursionError:
        return info, f"{file} is nested too deeply"
    except (ValueError, MemoryError) as error:
        return info, f"{file} is not valid JSON: {error}"
    if not isinstance(document, dict):
        return info, f"{file} must contain a JSON object"
    fields: dict[str, Any] = {}
    problems = []
    for field, read in (
        ("class_names", _read_class_names),
        ("dataset", _read_dataset),
        ("test_accuracy", _read_accuracy),
        ("reference", _read_reference),
    ):
        try:
            fields[field] = read(document)
        except ValueError as error:
            problems.append(str(error))
    return ModelInfo(**fields), f"{file}: {'; '.join(problems)}" if problems else ""


def _read_class_names(document: Mapping[str, Any]) -> tuple[str, ...]:
    names = document.get("class_names")
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(n, str | int) and not isinstance(n, bool) for n in names):
        raise ValueError("class_names must be a list of strings")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"class_names must have at most {MAX_CLASSES:,} entries")
    names = [printable(str(name)) for name in names]
    if len(set(names)) < len(names):
        raise ValueError("class_names must be unique")
    return tuple(names)


def _read_dataset(document: Mapping[str, Any]) -> str | None:
    name = _read_member(document, "dataset", "name")
    if name is not None and not isinstance(name, str):
        raise ValueError("dataset.name must be a string")
    return None if name is None else printable(name)


def _read_accuracy(document: Mapping[str, Any]) -> float | None:
    accuracy = _read_member(document, "test", "accuracy")
    if accuracy is None:
        return None
    if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
        raise ValueError("test.accuracy must be a number from 0 to 1")
    return float(accuracy)


def _read_reference(document: Mapping[str, Any]) -> Reference | None:
    reference = document.get("reference")
    if reference is None:  # an export of an earlier version
        return None
    if not isinstance(reference, dict):
        raise ValueError("reference must be an object")
    images, shares = reference.get("images"), reference.get("class_shares")
    means: list[Any] = [reference.get(name) for name in ("mean_confidence", "mean_typicality")]
    if type(images) is not int or images < 1:
        raise ValueError("reference.images must be a positive number")
    if not isinstance(shares, list) or not shares or not all(map(_is_share, shares)) or abs(sum(shares) - 1) > 1e-3:
        raise ValueError("reference.class_shares must be shares that sum to 1")
    if not all(map(_is_share, means)):
        raise ValueError("reference.mean_confidence and mean_typicality must be numbers from 0 to 1")
    confidence, typicality = means
    return Reference(images, tuple(shares), confidence, typicality)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1.001  # rounding


def _read_member(document: Mapping[str, Any], key: str, member: str) -> Any:
    value = document.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object")
    return None if value is None else value.get(member)


def read_label_names(predictor: Predictor) -> tuple[str, ...]:
    """Return the class names from a model's signature `labels`; empty if it is missing or fails."""
    default = predictor.signatures.get(DEFAULT_SIGNATURE)
    lookup = predictor.signatures.get(LABELS_SIGNATURE)
    shape = default.outputs["probabilities"].shape if default and "probabilities" in default.outputs else None
    if not lookup or lookup.inputs.keys() != {"class_id"} or "label" not in lookup.outputs:
        return ()
    if not shape or shape[-1] is None or shape[-1] > MAX_CLASSES:
        return ()
    try:
        class_ids = np.arange(shape[-1], dtype=lookup.inputs["class_id"].numpy_dtype)
        labels = predictor.predict(LABELS_SIGNATURE, {"class_id": class_ids})["label"]
        names = tuple(label.decode("utf-8", "replace") for label in labels.tolist())
    except Exception as error:  # a faulty signature must not affect the others
        logger.warning("cannot read the class names, so class numbers are shown instead: %s", error)
        return ()
    return names if len(set(names)) == len(names) else ()
