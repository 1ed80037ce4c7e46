"""The bare training step, repeated on one batch in memory: what a training loop can at most reach."""

from __future__ import annotations

import json
import time

import click
import keras
import numpy as np
import tensorflow as tf

from training.config import VARIANTS, TrainingConfig
from training.models import build_model


@click.command()
@click.option("--variant", type=click.Choice(VARIANTS), default="sequential")
@click.option("--preset")
@click.option("--seconds", type=float, default=20.0)
def main(*, variant: str, preset: str | None, seconds: float) -> None:
    """Print the images a second as JSON."""
    config = TrainingConfig.fill_in(variant=variant, preset=preset)
    model = build_model(variant, (32, 32, 3), classes=10, preset=config.preset, dtype=config.dtype)
    optimizer, loss = config.recipe.make_optimizer(config, steps_per_epoch=1000), config.recipe.make_loss()
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    images = tf.constant(rng.integers(0, 256, (config.batch_size, 32, 32, 3), np.uint8))
    labels = tf.constant(rng.integers(0, 10, config.batch_size))

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    for _ in range(3):
        step()
    times = []
    end_s = time.perf_counter() + seconds
    while (started_s := time.perf_counter()) < end_s:
        step().numpy()
        times.append(time.perf_counter() - started_s)
    print(json.dumps({"images_per_s": config.batch_size / float(np.mean(times))}))


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    main()
