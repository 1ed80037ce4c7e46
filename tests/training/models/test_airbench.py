"""The airbench network: its layers, presets, dtypes and folding."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from training.config import DTYPES, TrainingConfig
from training.data import Dataset
from training.data.shapes import draw_shapes
from training.models import RECIPES, build_model
from training.models.airbench import AirbenchBlock, BatchNorm, Conv, Whitening
from training.models.presets import PRESETS, Augmentation, Block
from training.models.recipes import fastest_dtype
from training.run_dir import RunDir
from training.trainer import load_best_model, train_and_evaluate

pytestmark = pytest.mark.usefixtures("blank_plots")


def random_images(count=64, shape=(32, 32, 3)):
    """Images whose neighbouring pixels have to do with each other, as in photographs."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, shape[0] // 4 + 1, shape[1] // 4 + 1, 3))
    fine = np.repeat(np.repeat(coarse, 4, axis=1), 4, axis=2)[:, : shape[0], : shape[1]]
    return np.clip(fine + rng.normal(0, 20, fine.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def dataset():
    train, test = draw_shapes(200, seed=0), draw_shapes(50, seed=1)
    return Dataset("shapes", "drawn", tuple("abcdefghij"), train=train, test=test)


def test_whitened_patches_are_uncorrelated_with_unit_variance():
    layer = Whitening()
    layer.build((None, 32, 32, 3))
    images = random_images(500)
    layer.adapt(images)
    outputs = tf.nn.conv2d(tf.cast(images, tf.float32), layer.kernel, 1, "VALID") + layer.offset
    features = outputs.numpy()[..., :8].reshape(-1, 8)
    np.testing.assert_allclose(np.cov(features.T), np.eye(8), atol=0.02)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(outputs[..., 8:], -outputs[..., :8], rtol=1e-3, atol=1e-3)
    assert not layer.trainable_variables


def test_whitening_keeps_the_directions_of_largest_variance():
    layer = Whitening()
    layer.build((None, 32, 32, 3))
    images = random_images(500)
    layer.adapt(images)
    pixels = (images - images.mean(axis=(0, 1, 2))) / images.std(axis=(0, 1, 2))
    patches = np.moveaxis(np.lib.stride_tricks.sliding_window_view(pixels, (2, 2), axis=(1, 2)), 3, -1).reshape(-1, 12)
    variances = np.sort(np.linalg.eigvalsh(np.cov(patches.T)))
    # Of pixels of one deviation, a filter of a whitened direction is as long as that direction's deviation is small.
    filters = layer.kernel.numpy()[..., :8] * images.std(axis=(0, 1, 2))[:, None]
    lengths = np.linalg.norm(filters.reshape(12, 8), axis=0)
    np.testing.assert_allclose(np.sort(lengths**-2), variances[4:], rtol=0.02, atol=1e-3)
    assert variances[-1] > 2 * variances[7]  # the directions differ clearly


def test_images_of_one_colour_can_be_whitened():
    layer = Whitening()
    layer.build((None, 8, 8, 3))
    layer.adapt(np.full((3, 8, 8, 3), 7, np.uint8))
    assert np.isfinite(layer(tf.fill((1, 8, 8, 3), tf.constant(7, tf.uint8)))).all()


def test_convolutions_are_initialized_as_the_identity():
    layer = Conv(6)
    inputs = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(layer(inputs)[..., :4], inputs, atol=1e-6)
    assert np.abs(layer(inputs)[..., 4:]).max() > 0.01


@pytest.mark.parametrize("size", [32, 31])
def test_cropped_pixels_do_not_influence_the_output(size):
    model = build_model("airbench", (size, size, 3), classes=10)
    images = random_images(count=2, shape=(size, size, 3))
    whole = model.block1(model.whitening(images))
    np.testing.assert_allclose(model.block1(model.whitening(images[:, :31, :31])), whole, atol=1e-4)
    assert whole.shape == (2, 14, 14, PRESETS["quick"].blocks[0].filters)


@pytest.mark.parametrize(("preset", "sizes"), [("quick", (14, 6, 3)), ("best", (14, 7, 3))])
def test_blocks_have_the_documented_feature_map_sizes(preset, sizes):
    model = build_model("airbench", (32, 32, 3), classes=10, preset=preset)
    features = model.whitening(random_images(count=2))
    blocks = (model.block1, model.block2, model.block3)
    for block, size, (filters, depth, _) in zip(blocks, sizes, PRESETS[preset].blocks, strict=True):
        features = block(features)
        assert features.shape == (2, size, size, filters)
        assert len(block.convs) == depth


def test_third_convolution_of_a_block_is_residual():
    block = AirbenchBlock(4, depth=3)
    inputs = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    block(inputs)
    first_two = AirbenchBlock(4, depth=2)
    first_two(inputs)
    for ours, theirs in zip(first_two.convs, block.convs[:2], strict=True):
        ours.kernel.assign(theirs.kernel)
    block.norms[2].bias.assign([-1e3] * 4)  # nothing is left of it
    np.testing.assert_allclose(block(inputs), first_two(inputs), atol=1e-5)
    block.norms[2].bias.assign([2.0] * 4)  # and its filters begin as the identity
    np.testing.assert_allclose(block(inputs), 2 * first_two(inputs) + 2, rtol=1e-4)


def test_batch_norm_matches_keras_without_scale():
    ours = BatchNorm()
    theirs = keras.layers.BatchNormalization(scale=False, momentum=ours.MOMENTUM, epsilon=ours.EPSILON)
    inputs = np.random.default_rng(0).normal(3, 2, size=(64, 5, 5, 4)).astype(np.float32)
    for _ in range(3):
        np.testing.assert_allclose(ours(inputs, training=True), theirs(inputs, training=True), atol=1e-4)
    # The fused operation's variance is that of a sample: n / (n - 1) of the other.
    np.testing.assert_allclose(ours(inputs, training=False), theirs(inputs, training=False), atol=5e-3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(32, 32, 3), (15, 40, 3), (31, 22, 3)])
def test_folded_network_gives_the_same_outputs(shape, preset):
    model = build_model("airbench", shape, classes=7, preset=preset)
    images = random_images(shape=shape)
    model.adapt(images)
    for _ in range(5):
        model(images, training=True)  # moves the batch norms' means and variances
    for block in (model.block1, model.block2, model.block3):
        for norm in block.norms:
            norm.bias.assign(np.random.default_rng(1).normal(0, 0.5, norm.bias.shape))
    folded = RECIPES["airbench"].fold(model, TrainingConfig.fill_in(variant="airbench"), temperature=1.0)
    np.testing.assert_allclose(tf.nn.softmax(folded.logits(tf.constant(images))), model(images), atol=1e-5)
    cooled = RECIPES["airbench"].fold(model, TrainingConfig.fill_in(variant="airbench"), temperature=2.0)
    np.testing.assert_allclose(
        2 * cooled.logits(tf.constant(images)), folded.logits(tf.constant(images)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_is_restored_from_its_config(dtype, tmp_path):
    model = build_model("airbench", (32, 32, 3), classes=10, dtype=dtype)
    model.adapt(random_images())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(random_images()), model(random_images()))


def test_bfloat16_convolutions_match_float32_within_rounding():
    exact, rounded = (build_model("airbench", (32, 32, 3), classes=10, dtype=dtype) for dtype in DTYPES)
    rounded.set_weights(exact.get_weights())
    assert {weight.dtype for weight in rounded.weights} == {"float32"}
    images = random_images()
    features = [model.block1.convs[0](model.whitening(images)) for model in (exact, rounded)]
    assert [feature.dtype for feature in features] == [tf.float32, tf.bfloat16]
    outputs = [model(images, training=True).numpy() for model in (exact, rounded)]
    assert outputs[1].dtype == np.float32
    # A bfloat16 keeps 8 bits of a number; seven convolutions add up to a little more.
    assert 1e-5 < np.abs(outputs[0] - outputs[1]).mean() < 5e-3


def test_default_dtype_depends_on_the_cpu_s_instructions(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert fastest_dtype(cpuinfo) == "float32"
    for flags, dtype in (("fma avx512f", "float32"), ("fma avx512_bf16 fsrm", "mixed_bfloat16")):
        cpuinfo.write_text(f"model name\t: avx512_bf16\nflags\t\t: {flags}\n\nflags\t\t: {flags}\n")
        assert fastest_dtype(cpuinfo) == dtype
    assert TrainingConfig.fill_in(variant="airbench").dtype == fastest_dtype()
    for dtype in DTYPES:
        assert TrainingConfig.fill_in(variant="airbench", dtype=dtype).dtype == dtype
    with pytest.raises(ValueError, match="dtype must be float32 for the variant subclass"):
        TrainingConfig.fill_in(variant="subclass", dtype="mixed_bfloat16")


def test_evaluation_is_in_float32_after_bfloat16_training(dataset, tmp_path):
    weights = []
    for dtype in DTYPES:
        run = RunDir.create(tmp_path / dtype, TrainingConfig.fill_in(variant="airbench", epochs=1, dtype=dtype))
        train_and_evaluate(run, dataset)
        model = load_best_model(run).model
        assert {layer.compute_dtype for layer in model._flatten_layers()} == {"float32"}
        weights.append(model.get_weights())
    differences = [np.abs(exact - rounded).max() for exact, rounded in zip(*weights, strict=True)]
    assert 1e-6 < max(differences) < 0.1


def test_presets_are_defaults_of_missing_settings():
    for name, preset in PRESETS.items():
        config = TrainingConfig.fill_in(variant="airbench", preset=name, epochs=3)
        assert (config.epochs, config.batch_size) == (3, preset.batch_size)
        for dtype in DTYPES:
            config = TrainingConfig.fill_in(variant="airbench", preset=name, dtype=dtype)
            assert config.epochs == preset.epochs[dtype]
    assert TrainingConfig.fill_in(variant="airbench").preset == "quick"
    assert TrainingConfig.fill_in() == TrainingConfig()
    with pytest.raises(ValueError, match="preset must be one of quick, best for the variant airbench; got 'huge'"):
        TrainingConfig.fill_in(variant="airbench", preset="huge")
    with pytest.raises(ValueError, match="preset must be left out for the variant sequential; got 'quick'"):
        TrainingConfig.fill_in(preset="quick")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"blocks": (Block(16, 1, "VALID"), Block(16, 1, "SAME"), Block(16, 2, "SAME"))},
        {"augmentation": Augmentation(max_shift=4)},
        {"augmentation": Augmentation(max_shift=2, cutout=8)},
    ],
    ids=str,
)
def test_every_setting_of_a_preset_affects_training(changed, dataset, tmp_path, monkeypatch):
    """Two runs of a preset give the same weights, and others where anything in the preset is changed between them."""
    config = TrainingConfig.fill_in(variant="airbench", epochs=1, batch_size=50)
    small = dataclasses.replace(PRESETS["quick"], blocks=(Block(16, 1, "VALID"),) * 2 + (Block(16, 2, "SAME"),))
    weights: list[list[np.ndarray]] = []
    for preset in (small, dataclasses.replace(small, **changed)):
        monkeypatch.setitem(PRESETS, "quick", preset)
        run = RunDir.create(tmp_path / str(len(weights)), config)
        train_and_evaluate(run, dataset)
        weights.append(load_best_model(run).model.get_weights())
    shapes = [[weight.shape for weight in of_run] for of_run in weights]
    same = shapes[0] == shapes[1] and all(
        np.allclose(one, other, atol=1e-3) for one, other in zip(*weights, strict=True)
    )
    assert same == (not changed)
