"""The signatures of an exported model: which it has, and the outputs of each."""

from __future__ import annotations

# What `serving_default` returns: probabilities, class and label, or the probabilities alone.
DEFAULT_OUTPUTS = ("all", "probabilities")

_PREDICTION = ("probabilities", "class_id", "label")
_GUARDED = (*_PREDICTION, "typicality", "is_typical", "label_set")


def output_names(*, default_outputs: str, explain: bool, guarded: bool) -> dict[str, tuple[str, ...]]:
    """Return the outputs of every signature that classifies images, by its name.

    Raises:
        ValueError: `default_outputs` is not one of `DEFAULT_OUTPUTS`.
    """
    if default_outputs not in DEFAULT_OUTPUTS:
        raise ValueError(f"default_outputs must be {' or '.join(DEFAULT_OUTPUTS)}, not {default_outputs!r}")
    signatures: dict[str, tuple[str, ...]] = {
        "serving_default": _PREDICTION if default_outputs == "all" else ("probabilities",),
        "image_bytes": _PREDICTION,
        "probabilities": ("probabilities",),
    }
    if explain:
        signatures["explain"] = ("heat_map", "class_id")
    if guarded:
        signatures |= {"guarded": _GUARDED, "guarded_bytes": _GUARDED}
    return signatures
