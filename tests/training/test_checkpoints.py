import keras
import numpy as np
import pytest

from training.checkpoints import Checkpoints, read_best_state
from training.config import VARIANTS
from training.errors import RunError
from training.models import build_model


def make(variant, folder, *, seed=0):
    keras.utils.set_random_seed(seed)
    model = build_model(variant, (24, 24, 3), classes=4, conv_activation="relu")
    optimizer = keras.optimizers.Adam(1e-3)
    return model, optimizer, Checkpoints(folder, model=model, optimizer=optimizer)


def step(model, optimizer, *, seed=0):
    """One optimizer step on random images."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.train_on_batch(images, rng.integers(0, 4, 8))


def values(*owners):
    return [variable.numpy() for owner in owners for variable in owner.variables]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_latest_restores_weights_optimizer_and_state_to_the_bit(variant, tmp_path):
    model, optimizer, checkpoints = make(variant, tmp_path)
    step(model, optimizer)
    optimizer.learning_rate.assign(2e-4)
    checkpoints.save_latest({"epoch": 1, "best": float("inf")})

    again, other_optimizer, reopened = make(variant, tmp_path, seed=1)
    assert reopened.restore_latest() == {"epoch": 1, "best": float("inf")}
    assert_same(values(model, optimizer), values(again, other_optimizer))
    step(model, optimizer, seed=5)
    step(again, other_optimizer, seed=5)
    assert_same(values(model, optimizer), values(again, other_optimizer))


@pytest.mark.parametrize("variant", VARIANTS)
def test_best_restores_the_outputs(variant, tmp_path):
    # Outputs are compared: TensorFlow's own checks do not miss a layer that a checkpoint leaves out.
    model, optimizer, checkpoints = make(variant, tmp_path)
    step(model, optimizer)
    checkpoints.save_best({"val_loss": 1.25})
    images = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    expected = model(images).numpy()
    step(model, optimizer)
    assert (model(images).numpy() != expected).any()

    again, _, reopened = make(variant, tmp_path, seed=1)
    assert read_best_state(tmp_path) == {"val_loss": 1.25}
    assert (again(images).numpy() != expected).any()  # reading the state left the weights alone
    assert reopened.restore_best() == {"val_loss": 1.25}
    np.testing.assert_array_equal(again(images).numpy(), expected)


def test_nothing_saved_is_no_error(tmp_path):
    _, _, checkpoints = make("sequential", tmp_path)
    assert checkpoints.restore_latest() is None
    assert checkpoints.restore_best() is None
    assert read_best_state(tmp_path) is None


def test_one_checkpoint_of_each_is_kept_and_never_overwritten_in_place(tmp_path):
    _, _, checkpoints = make("sequential", tmp_path)
    for epoch in range(3):
        checkpoints.save_latest({"epoch": epoch})
    _, _, reopened = make("sequential", tmp_path)
    reopened.save_latest({"epoch": 3})
    assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == [
        "checkpoint",
        "checkpoint-4.data-00000-of-00001",
        "checkpoint-4.index",
    ]


def test_what_a_killed_save_left_behind_is_cleared_away(tmp_path):
    model, _, checkpoints = make("sequential", tmp_path)
    checkpoints.save_latest({"epoch": 1})
    expected = values(model)
    # What is there after a kill between the files of the second checkpoint and the record of it.
    for end in ("data-00000-of-00001", "index"):
        (tmp_path / "latest" / f"checkpoint-2.{end}").write_bytes(b"half")
    again, _, reopened = make("sequential", tmp_path, seed=1)
    assert not list((tmp_path / "latest").glob("checkpoint-2*"))
    assert reopened.restore_latest() == {"epoch": 1}
    assert_same(values(again), expected)


def test_a_damaged_checkpoint_is_named(tmp_path):
    _, _, checkpoints = make("sequential", tmp_path)
    checkpoints.save_latest({"epoch": 1})
    data = tmp_path / "latest" / "checkpoint-1.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:1000])
    _, _, reopened = make("sequential", tmp_path)
    with pytest.raises(RunError, match=r"checkpoint-1 cannot be restored"):
        reopened.restore_latest()


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    _, _, checkpoints = make("sequential", tmp_path)
    checkpoints.save_best({"val_loss": 1.0})
    model = build_model("sequential", (24, 24, 3), classes=5, conv_activation="relu")
    other = Checkpoints(tmp_path, model=model, optimizer=keras.optimizers.Adam())
    with pytest.raises(RunError, match="another model"):
        other.restore_best()
