"""The configuration of a run. Imports no TensorFlow, so that usage errors are reported at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.models.recipe import Recipe
from training.models.recipes import RECIPES

DATASETS = ("cifar10", "shapes", "folder")
VARIANTS = tuple(RECIPES)
LOOPS = ("fit", "custom")
STRATEGIES = ("single", "mirrored", "multiworker")
CONV_ACTIVATIONS = ("relu", "linear")
DTYPES = ("float32", "mixed_bfloat16")
# May differ when a run is resumed. Data and weights are compared by their content.
CHANGEABLE = frozenset({"data", "epochs", "strategy", "stream", "tensorboard", "weights"})
_PATHS = ("data", "weights")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Configuration of a run. The same config gives the same run.

    Attributes:
        dataset: one of `DATASETS`.
        data: path of the dataset; with `None`, cifar10 is searched in its usual places.
        image_size: (height, width) in pixels to resize all images to; `None` keeps small images of equal size.
        variant: the model, one of `VARIANTS`.
        preset: of airbench, one of `PRESETS`; `None` for other variants.
        backbone: of transfer, one of `BACKBONES`; `None` for other variants.
        weights: file with the weights of the backbone; `None` searches Keras's cache.
        weights_sha256: expected checksum of that file, in hexadecimal digits; `None` accepts any.
        loop: the training loop, one of `LOOPS`.
        strategy: the replicas of the model, one of `STRATEGIES`; several need the loop `custom`.
        conv_activation: after each convolution of the article's network, one of `CONV_ACTIVATIONS`.
        epochs: passes over the training images.
        batch_size: images per optimizer step.
        learning_rate: initial learning rate of the optimizer.
        plateau_factor: multiplies Adam's learning rate when the validation loss has not improved.
        plateau_patience: epochs without improvement before that.
        dtype: Keras dtype policy of airbench's convolutions in training, one of `DTYPES`. Evaluation and export use
            float32.
        stream: read the images of an image folder or of shards batch by batch, instead of keeping them in memory.
        seed: of the validation split, the initial weights and the order of the images.
        deterministic: bit-identical results, slower.
        tensorboard: write TensorBoard logs into the run directory.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    dataset: str = "cifar10"
    data: Path | None = None
    image_size: tuple[int, int] | None = None
    variant: str = "sequential"
    preset: str | None = None
    backbone: str | None = None
    weights: Path | None = None
    weights_sha256: str | None = None
    loop: str = "fit"
    strategy: str = "single"
    conv_activation: str = "relu"
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    plateau_factor: float = 0.2
    plateau_patience: int = 2
    dtype: str = "float32"
    stream: bool = False
    seed: int = 0
    deterministic: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("dataset", DATASETS),
            ("variant", VARIANTS),
            ("loop", LOOPS),
            ("strategy", STRATEGIES),
            ("conv_activation", CONV_ACTIVATIONS),
            ("dtype", DTYPES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name, known in (("preset", self.recipe.presets), ("backbone", self.recipe.backbones)):
            value = getattr(self, name)
            if known and value not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)} for the variant {self.variant}; got {value!r}"
                )
            if not known and value is not None:
                raise ValueError(f"{name} must be left out for the variant {self.variant}; got {value!r}")
        for name in ("weights", "weights_sha256"):
            if not self.recipe.backbones and getattr(self, name) is not None:
                raise ValueError(f"{name} must be left out for the variant {self.variant}; they are of a backbone")
        if self.dtype not in self.recipe.dtypes:
            raise ValueError(
                f"dtype must be {' or '.join(self.recipe.dtypes)} for the variant {self.variant}; got {self.dtype!r}"
            )
        if self.strategy != "single" and self.loop != "custom":
            raise ValueError(
                f"strategy {self.strategy} needs the loop custom: Keras's fit fails with several replicas "
                "(https://github.com/keras-team/keras/issues/20585)"
            )
        if self.stream and self.dataset != "folder":
            raise ValueError(f"stream is for the dataset folder: the images of {self.dataset} fit into memory")
        for name in ("epochs", "batch_size", "plateau_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size must be (height, width) in pixels; got {self.image_size}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
        if not 0 < self.plateau_factor < 1:
            raise ValueError(f"plateau_factor must lie between 0 and 1; got {self.plateau_factor}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and {2**31 - 1}; got {self.seed}")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the variant."""
        return RECIPES[self.variant]

    @classmethod
    def fill_in(cls, **given: Any) -> TrainingConfig:
        """Return a config with the given values; missing ones and `None` become the defaults of variant and preset.

        Raises:
            ValueError: a value is out of range.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if recipe := RECIPES.get(given.get("variant", cls.variant)):
            given = {**recipe.defaults(preset=given.get("preset"), dtype=given.get("dtype")), **given}
        return cls(**given)

    def to_json(self) -> str:
        """Return the config as JSON."""
        values = dataclasses.asdict(self)
        values |= {name: str(values[name]) for name in _PATHS if values[name] is not None}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainingConfig:
        """Parse the output of `to_json`.

        Raises:
            ValueError: the JSON is invalid, or a field is unknown, of another type or out of range.
        """
        values: dict[str, Any] = json.loads(text)
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) - fields:
            raise ValueError(f"expected a JSON object with the fields {', '.join(sorted(fields))}")
        for field in dataclasses.fields(cls):
            _check_type(field, values.get(field.name, field.default))
        values |= {name: Path(values[name]) for name in _PATHS if values.get(name) is not None}
        if values.get("image_size") is not None:
            values["image_size"] = tuple(values["image_size"])
        return cls(**values)

    def changes_from(self, earlier: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Compare with an earlier config of the same run, without the fields that may change.

        Args:
            earlier: its JSON values.

        Returns:
            (value now, value then) of each field that differs.
        """
        now = json.loads(self.to_json())
        fixed = now.keys() & earlier.keys() - CHANGEABLE
        return {name: (now[name], earlier[name]) for name in sorted(fixed) if now[name] != earlier[name]}


def _check_type(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise `ValueError` if a JSON value has not the type of its field."""
    if value is None and field.default is None:
        return
    if field.name == "image_size":
        fits = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(side) is int for side in value)
        expected = "[height, width]"
    else:
        kind = str if field.default is None else type(field.default)
        fits = type(value) in ((int, float) if kind is float else (kind,))
        expected = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    if not fits:
        raise ValueError(f"{field.name} must be {expected}; got {json.dumps(value)}")
