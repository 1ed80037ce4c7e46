"""What a model variant has to define: how it is built, trained, folded and sized.

Importing this module does not import TensorFlow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from training.models.backbones import Backbone
from training.models.presets import Preset

if TYPE_CHECKING:
    import keras

    from training.config import TrainingConfig
    from training.data.streamed_images import Images
    from training.models.inference_graph import InferenceGraph

Shape = tuple[int, int, int]  # (height, width, channels) of an image


class NetworkSize(NamedTuple):
    """Size of a network.

    Attributes:
        weights: number of trained weights.
        features: number of feature values that are computed for one image.
        frozen: number of weights that are not trained.
        cached: number of feature values that are kept of each training image, in memory and in the run directory.
    """

    weights: int
    features: int
    frozen: int = 0
    cached: int = 0


class TrainedPart(NamedTuple):
    """What the training loops train.

    Attributes:
        model: inputs to probabilities, (batch, classes).
        train: its inputs of the training images, (n, ...).
        validation: its inputs of the validation images.
    """

    model: keras.Model
    train: Images
    validation: Images


class Recipe(ABC):
    """One model variant.

    Attributes:
        presets: by name; empty if the variant has a single size.
        backbones: by name; empty if all weights are trained.
        dtypes: Keras dtype policies that the variant can be trained with.
        min_image_size: smallest height and width of the images, in pixels.
        default_image_size: (height, width) that the images of a folder are resized to if they are large or differ;
            `None` for the usual one.
        values_per_weight: the weight itself and the optimizer's variables for it.
        uses_plateau: the learning rate is reduced when the validation loss stops improving.
    """

    presets: Mapping[str, Preset] = MappingProxyType({})
    backbones: Mapping[str, Backbone] = MappingProxyType({})
    dtypes: tuple[str, ...] = ("float32",)
    min_image_size: int
    default_image_size: tuple[int, int] | None = None
    values_per_weight: int
    uses_plateau: bool

    def defaults(self, *, preset: str | None, dtype: str | None) -> dict[str, Any]:  # noqa: ARG002
        """Return the fields of `TrainingConfig` that differ from its own defaults, for a preset and a dtype."""
        return {}

    def complete(self, config: TrainingConfig) -> TrainingConfig:
        """Check what the variant needs besides the data, before that is loaded; return the config with what was found.

        Raises:
            WeightsError: the weights of the backbone are missing, damaged or of another network.
        """
        return config

    @abstractmethod
    def build(
        self,
        input_shape: Shape,
        *,
        classes: int,
        conv_activation: str,
        preset: str | None,
        backbone: str | None,
        dtype: str,
    ) -> keras.Model:
        """Build the network with random weights; see `training.models.build_model`."""

    def prepare(
        self,
        model: keras.Model,
        config: TrainingConfig,  # noqa: ARG002
        train: Images,
        validation: Images,
        *,
        is_new: bool,  # noqa: ARG002
        cache: Path,  # noqa: ARG002
    ) -> TrainedPart:
        """Prepare a built model for training.

        Args:
            model: built for `config`.
            config: of the run.
            train: the training images, uint8 (n, height, width, 3), in memory or streamed.
            validation: the validation images.
            is_new: the weights are random; otherwise they were restored from a checkpoint.
            cache: folder for what a resumed run need not compute again.

        Raises:
            WeightsError: the weights of the backbone are missing, damaged or have changed.
        """
        return TrainedPart(model, train, validation)

    def make_loss(self) -> keras.losses.Loss:
        """Return the loss of (labels, probabilities)."""
        import keras

        return keras.losses.SparseCategoricalCrossentropy()

    def make_optimizer(
        self,
        config: TrainingConfig,
        *,
        steps_per_epoch: int,  # noqa: ARG002
    ) -> keras.optimizers.Optimizer:
        """Return a new optimizer."""
        import keras

        return keras.optimizers.Adam(config.learning_rate)

    @abstractmethod
    def fold(self, model: keras.Model, config: TrainingConfig, *, temperature: float) -> InferenceGraph:
        """Return the inference graph of a trained model, with its logits divided by `temperature`."""

    @abstractmethod
    def size(self, config: TrainingConfig, input_shape: Shape, *, classes: int) -> NetworkSize:
        """Return the size of the network without building it."""
