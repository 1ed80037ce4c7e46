"""The labels of an imported model: from a file, a comma-separated list, or JSON. Imports no TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.errors import ModelError

_FORMS = (
    "Give a file with one label a line, a comma-separated list, or JSON: a list of labels, or an object from labels to "
    "class ids, as Keras's class_indices has them"
)


def read_labels(given: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Return the labels in the order of the class ids.

    Args:
        given: the labels themselves, or as text: a file, a comma-separated list, or JSON.

    Raises:
        ModelError: they cannot be read, one is empty, or two are equal.
    """
    labels = _read(given) if isinstance(given, str | Path) else [str(label) for label in given]
    labels = [label.strip() for label in labels]
    if len(labels) < 2:
        raise ModelError(f"found {len(labels)} label in {given}, and a classifier needs at least two. {_FORMS}")
    if "" in labels:
        raise ModelError(f"label {labels.index('') + 1} of {len(labels)} in {given} is empty. {_FORMS}")
    if duplicates := sorted({label for label in labels if labels.count(label) > 1}):
        raise ModelError(
            f"the labels have {duplicates[0]!r} {labels.count(duplicates[0])} times: each class needs its own label"
        )
    return tuple(labels)


def _read(given: str | Path) -> list[str]:
    text = str(given)
    if not text.lstrip().startswith(("[", "{")):
        path = Path(given)
        try:
            is_file = path.is_file()
        except (OSError, ValueError):  # too long for a path
            is_file = False
        if not is_file:
            if "," not in text:
                raise ModelError(f"the labels {text!r} are neither a file nor a list. {_FORMS}")
            return text.split(",")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"the labels cannot be read from {path}: {error}") from error
        if not text.lstrip().startswith(("[", "{")):
            return text.strip().splitlines()
    try:
        return _order(json.loads(text))
    except ValueError as error:
        raise ModelError(f"the labels in {given} are not valid JSON: {error}. {_FORMS}") from error


def _order(values: Any) -> list[str]:
    """Return the labels of a JSON document: a list, or an object from labels to class ids or the other way round."""
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    if isinstance(values, dict) and values:
        by_id = {value: key for key, value in values.items() if type(value) is int}
        if not by_id:
            by_id = {int(key): value for key, value in values.items() if key.isdecimal() and isinstance(value, str)}
        if len(by_id) == len(values) and set(by_id) == set(range(len(values))):
            return [by_id[class_id] for class_id in range(len(values))]
    raise ValueError("expected a list of labels, or an object that gives each label its class id, from 0 on")
