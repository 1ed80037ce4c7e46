"""The article's own way of training, for comparison: `python -m benchmarks.article --style fit|tape`.

"Training a Model with TensorFlow: Sequential API and Sub-classing" trains one small network on CIFAR-10 in two ways.
This is both of them, written anew and kept as they are meant to be read, its weaknesses marked: nothing here is used by
the package. Both report the test accuracy of the epoch that is best on 5,000 held-out training images, where the
article chooses on the test set, so that the figures can be compared with the package's.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import keras
import numpy as np
import tensorflow as tf
from keras import layers

from training.config import TrainingConfig
from training.data import Dataset, Split, load_dataset
from training.data.input_pipeline import split_validation

BATCH_SIZE = 128


@click.command()
@click.option("--style", type=click.Choice(["fit", "tape"]), default="fit", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Where CIFAR-10 lies.  [default: as in training]")
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one line of JSON.")
def main(*, style: str, data: Path | None, epochs: int, seed: int, as_json: bool) -> None:
    """Train the article's network in the article's way, and print what it reaches and how long it takes."""
    keras.utils.set_random_seed(seed)
    dataset = load_dataset(TrainingConfig(data=data, seed=seed))
    train, validation = split_validation(dataset.train, seed=seed)
    result = (train_by_fit if style == "fit" else train_by_tape)(train, validation, dataset, epochs)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(
        f"article, {style}: test accuracy {result.test_accuracy:.2%}, best epoch {result.epoch} of {epochs} "
        f"(val loss {result.val_loss:.4f}), {result.seconds / epochs:.1f} s an epoch"
    )


@dataclass(frozen=True)
class Result:
    epoch: int  # the best
    val_loss: float
    test_accuracy: float
    seconds: float  # of training and validation


def train_by_fit(train: Split, validation: Split, dataset: Dataset, epochs: int) -> Result:
    """Section 1: a Sequential model with linear convolutions, ImageDataGenerator, `fit`, ReduceLROnPlateau."""
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(64, 3),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    # The rescaling lives in the data, not in the model: whoever serves it has to remember that. The article's notebook
    # does not, and predicts from raw pixels.
    generator = tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255)
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = f"{folder}/best.weights.h5"
        history = model.fit(
            generator.flow(train.images, train.labels, BATCH_SIZE),
            validation_data=generator.flow(validation.images, validation.labels, BATCH_SIZE, shuffle=False),
            epochs=epochs,
            verbose=2,
            callbacks=[
                keras.callbacks.ReduceLROnPlateau(),
                keras.callbacks.ModelCheckpoint(best, save_best_only=True, save_weights_only=True),
            ],
        ).history
        seconds = time.perf_counter() - started_s
        model.load_weights(best)
    _, accuracy = model.evaluate(dataset.test.images / 255, dataset.test.labels, verbose=0)
    epoch = int(np.argmin(history["val_loss"]))
    return Result(epoch + 1, history["val_loss"][epoch], accuracy, seconds)


class ConvBlock(layers.Layer):
    """Section 2's block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = layers.Conv2D(64, 3, activation="relu")
        self.pool = layers.MaxPooling2D(2)

    def call(self, inputs: Any) -> Any:
        return self.pool(self.conv(inputs))


class Network(keras.Model):
    """Section 2's model."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = ConvBlock(), ConvBlock(), ConvBlock()
        self.flatten = layers.Flatten()
        self.hidden = layers.Dense(128, activation="relu")
        self.out = layers.Dense(10, activation="softmax")

    def call(self, inputs: Any) -> Any:
        return self.out(self.hidden(self.flatten(self.block3(self.block2(self.block1(inputs))))))


def train_by_tape(train: Split, validation: Split, dataset: Dataset, epochs: int) -> Result:
    """Section 3: the sub-classed model, steps with a GradientTape, a CheckpointManager that keeps the best."""
    model = Network()
    optimizer = keras.optimizers.Adam()
    loss_object = keras.losses.SparseCategoricalCrossentropy()

    # Float images of 0 to 1 are four times the memory, and nothing is prefetched while a step runs.
    def batches(split: Split) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(((split.images / 255).astype(np.float32), split.labels))

    train_batches = batches(train).shuffle(10_000).batch(BATCH_SIZE)
    validation_batches = batches(validation).batch(BATCH_SIZE)
    test_batches = batches(dataset.test).batch(BATCH_SIZE)

    @tf.function
    def train_step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_object(labels, model(images, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def test_step(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        probabilities = model(images, training=False)
        right = tf.reduce_sum(tf.cast(tf.argmax(probabilities, axis=1) == labels, tf.int32))
        return loss_object(labels, probabilities), right

    model(tf.zeros((1, 32, 32, 3)))
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=model), folder, max_to_keep=1)
        best_epoch, best_loss = 0, float("inf")
        for epoch in range(1, epochs + 1):
            total = sum(float(train_step(images, labels)) for images, labels in train_batches)
            # Batches, whatever their size, weigh the same; the article even divides by one batch too few.
            steps = len(train.labels) // BATCH_SIZE
            val_total = sum(float(test_step(images, labels)[0]) for images, labels in validation_batches)
            val_loss = val_total / (len(validation.labels) // BATCH_SIZE)
            print(f"epoch {epoch}/{epochs}  loss {total / steps:.4f}  val loss {val_loss:.4f}", flush=True)
            if val_loss < best_loss:
                best_epoch, best_loss = epoch, val_loss
                manager.save()
        seconds = time.perf_counter() - started_s
        manager.checkpoint.restore(manager.latest_checkpoint).expect_partial()
    right = sum(int(test_step(images, labels)[1]) for images, labels in test_batches)
    return Result(best_epoch, best_loss, right / len(dataset.test.labels), seconds)


if __name__ == "__main__":
    main()
