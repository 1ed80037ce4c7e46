"""Trains each variant with one replica and, streamed, with two, and prints the losses of all steps as JSON."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from training.config import TrainingConfig
from training.data import Split
from training.data.input_pipeline import LoopData, Parts, evaluation_batches, steps_per_epoch, training_batches
from training.data.shapes import draw_shapes
from training.data.streamed_images import ImageSource, StreamedImages
from training.distribution import Distribution
from training.history import EpochResult
from training.loops.custom import train_custom
from training.models import build_model

BATCH_SIZE = 48


class Losses:
    """The loss after every step, and of the validation images."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_epoch_begin(self, epoch: int) -> None:
        pass

    def on_batch_end(self, step: int, *, loss: float, accuracy: float) -> None:  # noqa: ARG002
        self.values.append(loss)

    def on_validation_batch_end(self) -> None:
        pass

    def on_epoch_end(self, result: EpochResult) -> None:
        self.values.append(result.val_loss)


def stream(split: Split) -> Split:
    """Return the split with streamed images."""
    images = StreamedImages(ImageSource((32, 32), split.images.__getitem__), np.arange(len(split.images)))
    return Split(images, split.labels)


def train(variant: str, distribution: Distribution) -> list[float]:
    split, validation = draw_shapes(120, seed=0), draw_shapes(35, seed=1)
    if distribution.replicas > 1:
        split, validation = stream(split), stream(validation)
    keras.utils.set_random_seed(0)
    config = TrainingConfig.fill_in(variant=variant, loop="custom", epochs=1, dtype="float32")
    steps = steps_per_epoch(split, BATCH_SIZE)
    parts = Parts(distribution.replicas, distribution.own)
    preset: Any = config.recipe.presets.get(config.preset or "")
    with distribution.strategy.scope():
        model = build_model(variant, (32, 32, 3), classes=10)
        if variant == "airbench":
            model.adapt(split.images)
        optimizer = config.recipe.make_optimizer(config, steps_per_epoch=steps)
        optimizer.build(model.trainable_variables)
        augmentation = preset.augmentation if preset else None
        batches = training_batches(
            split, batch_size=BATCH_SIZE, seed=0, first_epoch=0, parts=parts, augmentation=augmentation
        )
        data = LoopData(
            train=distribution.distribute(batches),
            validation=distribution.distribute(evaluation_batches(validation, batch_size=20, parts=parts)),
            steps_per_epoch=steps,
            images_per_epoch=len(split.labels),
            batch_size=BATCH_SIZE,
        )
        losses = Losses()
        train_custom(model, optimizer, config.recipe.make_loss(), data, epochs=range(1, 2), callback=losses)
    return losses.values


def main() -> None:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    single = Distribution.of(TrainingConfig())
    mirrored = Distribution.of(TrainingConfig(strategy="mirrored", loop="custom"))
    assert mirrored.replicas == 2
    variants = ("subclass", "airbench")
    print(json.dumps({name: [train(name, single), train(name, mirrored)] for name in variants}))


if __name__ == "__main__":
    main()
