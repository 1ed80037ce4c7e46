"""A run on classes of different sizes weights them in the loss."""

import logging

import numpy as np
import pytest

from training.api import train
from training.config import TrainingConfig
from training.data import Dataset, Split
from training.data.class_sizes import balance_classes
from training.data.input_pipeline import split_validation

pytestmark = pytest.mark.usefixtures("blank_plots")


def draw(counts, *, seed):
    """Grey images, brighter for the second class; many are of a brightness that both classes have."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(2, dtype=np.int64), counts)
    brightness = rng.normal(np.array([110, 150])[labels], 30)
    images = (brightness[:, None, None, None] + rng.normal(0, 5, (len(labels), 24, 24, 3))).clip(0, 255)
    return Split(images.astype(np.uint8), labels)


def test_a_rare_class_is_found_more_often(tmp_path, caplog, monkeypatch):
    dataset = Dataset("grey", "drawn", ("dark", "bright"), draw((400, 40), seed=0), draw((100, 100), seed=1))
    config = TrainingConfig(epochs=8, batch_size=40, learning_rate=3e-3)
    with caplog.at_level(logging.INFO):
        weighted = train(config, dataset, run_dir=tmp_path / "weighted")
    assert "loss is weighted: bright (40 images) 5.5, dark (400 images) 0.55" in caplog.text
    monkeypatch.setattr("training.trainer.balance_classes", lambda *_: None)
    plain = train(config, dataset, run_dir=tmp_path / "plain")
    recall, plain_recall = (result.evaluation.per_class[1].recall for result in (weighted, plain))
    assert recall > plain_recall + 0.1

    # The validation loss, which chooses the best checkpoint, is weighted too.
    _, validation = split_validation(dataset.train, seed=0)
    own = weighted.best.model(validation.images).numpy()[np.arange(len(validation.labels)), validation.labels]
    weights = balance_classes(dataset.train.labels, dataset.class_names)
    assert weights is not None
    assert weighted.best.epoch.val_loss == pytest.approx((weights[validation.labels] * -np.log(own)).mean(), rel=1e-3)
