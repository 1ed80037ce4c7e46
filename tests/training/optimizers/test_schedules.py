import json

import keras
import numpy as np
import pytest

from training.optimizers.schedules import PlateauSchedule


def by_keras(losses, *, factor, patience):
    """The learning rates Keras's own callback sets."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    callback = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=factor, patience=patience)
    callback.set_model(model)
    callback.on_train_begin()
    rates = []
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        rates.append(float(model.optimizer.learning_rate.numpy()))
    return rates


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_plateau_schedule_matches_keras_after_any_number_of_restores(patience):
    rng = np.random.default_rng(patience)
    losses = [*(np.exp(-np.arange(40) / 8) + rng.normal(0, 0.05, 40)).tolist(), 0.5, 0.49995, 0.4998, 0.4]
    schedule = PlateauSchedule(factor=0.5, patience=patience)
    rate, rates = 1.0, []
    for loss in losses:
        restored = PlateauSchedule(factor=0.5, patience=patience)
        restored.restore(json.loads(json.dumps(schedule.state)))
        schedule = restored
        rate = schedule.next_learning_rate(rate, val_loss=loss)
        rates.append(rate)
    expected = by_keras(losses, factor=0.5, patience=patience)
    assert expected[-1] < 1  # it did fall
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
