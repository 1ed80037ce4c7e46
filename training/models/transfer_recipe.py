"""The recipe of the `transfer` variant. Importing this module does not import TensorFlow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from training.models.backbones import (
    BACKBONES,
    DEFAULT_BACKBONE,
    SMALLEST_SIDE,
    build_backbone,
    enlarged_size,
    find_weights,
    hash_file,
    load_weights,
)
from training.models.recipe import NetworkSize, Recipe, Shape, TrainedPart

if TYPE_CHECKING:
    import keras

    from training.config import TrainingConfig
    from training.data.streamed_images import Images
    from training.models.inference_graph import InferenceGraph


class TransferRecipe(Recipe):
    """A frozen backbone with weights from a file; a head that is trained with Adam on features computed once."""

    backbones = BACKBONES
    min_image_size = 1  # small images are enlarged
    default_image_size = (160, 160)  # photos: the backbones learned from 224x224
    values_per_weight = 3
    uses_plateau = True

    @override
    def defaults(self, *, preset: str | None, dtype: str | None) -> dict[str, Any]:
        return {"backbone": DEFAULT_BACKBONE, "epochs": 20}

    @override
    def complete(self, config: TrainingConfig) -> TrainingConfig:
        assert config.backbone  # checked by the config
        path = find_weights(config.backbone, config.weights)
        trial = build_backbone(config.backbone, height=SMALLEST_SIDE, width=SMALLEST_SIDE)
        load_weights(trial, config.backbone, path, sha256=config.weights_sha256)
        return dataclasses.replace(config, weights=path, weights_sha256=hash_file(path))

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
        from training.models.transfer import build_transfer

        return build_transfer(input_shape, classes=classes, backbone=backbone or DEFAULT_BACKBONE)

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
        from training.models.feature_cache import compute_features

        if is_new:
            assert config.backbone  # checked by the config
            path = find_weights(config.backbone, config.weights)
            load_weights(model.backbone, config.backbone, path, sha256=config.weights_sha256)
        features = [
            compute_features(model, images, cache=cache, batch_size=config.batch_size) for images in (train, validation)
        ]
        if is_new:
            model.standardization.adapt(features[0])
        return TrainedPart(model.head, *features)

    @override
    def fold(self, model: keras.Model, config: TrainingConfig, *, temperature: float) -> InferenceGraph:
        from training.models.transfer import fold_transfer

        return fold_transfer(model, temperature=temperature)

    @override
    def size(self, config: TrainingConfig, input_shape: Shape, *, classes: int) -> NetworkSize:
        backbone = self.backbones[config.backbone or DEFAULT_BACKBONE]
        height, width = enlarged_size(*input_shape[:2])
        return NetworkSize(
            weights=(backbone.channels + 1) * classes,
            features=height * width * backbone.values_per_pixel,
            frozen=backbone.weights + 2 * backbone.channels,
            cached=backbone.channels,
        )
