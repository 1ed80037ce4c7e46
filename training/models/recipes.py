"""Registry of model recipes: how each variant is built, trained, folded and sized. A new model is added here.

Importing this module does not import TensorFlow: the methods import the networks when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from training.models.presets import PRESETS
from training.models.recipe import NetworkSize, Recipe, Shape, TrainedPart
from training.models.transfer_recipe import TransferRecipe

if TYPE_CHECKING:
    import keras

    from training.config import TrainingConfig
    from training.data.streamed_images import Images
    from training.models.inference_graph import InferenceGraph


class ArticleRecipe(Recipe):
    """The article's network, trained with Adam: as `keras.Sequential`, or as a subclass of `keras.Model`."""

    min_image_size = 22  # three rounds of a 3x3 convolution without padding and a 2x2 pooling leave one pixel
    values_per_weight = 3
    uses_plateau = True

    def __init__(self, *, subclassed: bool) -> None:
        self._subclassed = subclassed

    @override
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
        from training.models.sequential import build_sequential
        from training.models.subclass import build_subclass

        build = build_subclass if self._subclassed else build_sequential
        return build(input_shape, classes=classes, conv_activation=conv_activation)

    @override
    def fold(self, model: keras.Model, config: TrainingConfig, *, temperature: float) -> InferenceGraph:
        from training.models.folding import fold_article_network

        return fold_article_network(model, conv_activation=config.conv_activation, temperature=temperature)

    @override
    def size(self, config: TrainingConfig, input_shape: Shape, *, classes: int) -> NetworkSize:
        height, width, channels = input_shape
        weights, features = 0, height * width * channels
        for _ in range(3):
            weights += (3 * 3 * channels + 1) * 64
            height, width, channels = height - 2, width - 2, 64
            features += 2 * height * width * channels  # before and after the activation
            height, width = height // 2, width // 2
            features += height * width * channels
        flat = max(0, height) * max(0, width) * channels
        return NetworkSize(weights + (flat + 1) * 128 + 129 * classes, features)


class AirbenchRecipe(Recipe):
    """The airbench network, trained with Muon and a linear learning-rate decay."""

    presets = PRESETS
    dtypes = ("float32", "mixed_bfloat16")
    min_image_size = 15  # three poolings and the convolutions without padding leave one pixel
    values_per_weight = 2
    uses_plateau = False
    default_preset = "quick"

    @override
    def defaults(self, *, preset: str | None, dtype: str | None) -> dict[str, Any]:
        name, dtype = preset or self.default_preset, dtype or fastest_dtype()
        fields: dict[str, Any] = {"preset": name, "dtype": dtype}
        if (chosen := self.presets.get(name)) and dtype in chosen.epochs:
            fields |= {"epochs": chosen.epochs[dtype]}
            fields |= {"batch_size": chosen.batch_size, "learning_rate": chosen.learning_rate}
        return fields

    @override
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
        from training.models.airbench import build_airbench

        blocks = self.presets[preset or self.default_preset].blocks
        return build_airbench(input_shape, classes=classes, blocks=blocks, dtype=dtype)

    @override
    def prepare(
        self,
        model: keras.Model,
        config: TrainingConfig,
        train: Images,
        validation: Images,
        *,
        is_new: bool,
        cache: Path,
    ) -> TrainedPart:
        if is_new:
            model.adapt(train)
        return TrainedPart(model, train, validation)

    @override
    def make_loss(self) -> keras.losses.Loss:
        from training.models.losses import SmoothedCrossentropy

        return SmoothedCrossentropy()

    @override
    def make_optimizer(self, config: TrainingConfig, *, steps_per_epoch: int) -> keras.optimizers.Optimizer:
        from training.optimizers.muon import Muon
        from training.optimizers.schedules import LinearDecay

        return Muon(LinearDecay(config.learning_rate, steps=config.epochs * steps_per_epoch))

    @override
    def fold(self, model: keras.Model, config: TrainingConfig, *, temperature: float) -> InferenceGraph:
        from training.models.folding import fold_airbench

        return fold_airbench(model, temperature=temperature)

    @override
    def size(self, config: TrainingConfig, input_shape: Shape, *, classes: int) -> NetworkSize:
        height, width, channels = input_shape
        whitening_filters = 16
        weights, features = 2 * 2 * channels * whitening_filters, height * width * channels
        height, width, channels = height - 1, width - 1, whitening_filters
        features += 2 * height * width * channels
        for block in self.presets[config.preset or self.default_preset].blocks:
            if block.padding == "VALID":
                height, width = height - 2, width - 2
            features += height * width * block.filters  # of the first convolution, before the pooling
            height, width = height // 2, width // 2
            for _ in range(block.depth):
                weights += (9 * channels + 3) * block.filters
                features += 3 * height * width * block.filters  # convolution, batch norm, activation
                channels = block.filters
        return NetworkSize(weights + channels * classes, features)


RECIPES: dict[str, Recipe] = {
    "sequential": ArticleRecipe(subclassed=False),
    "subclass": ArticleRecipe(subclassed=True),
    "airbench": AirbenchRecipe(),
    "transfer": TransferRecipe(),
}


def fastest_dtype(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the dtype policy that this machine's CPU trains convolutions fastest with.

    CPUs with bfloat16 instructions multiply bfloat16 at least twice as fast as float32; others half as fast.
    """
    try:
        text = cpuinfo.read_text()
    except OSError:  # not Linux
        return "float32"
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "mixed_bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags.split()) else "float32"
