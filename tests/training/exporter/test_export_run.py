"""Export of trained runs, on images of other sizes than CIFAR-10's."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from training.config import TrainingConfig
from training.data import Dataset, Split
from training.data.shapes import draw_shapes
from training.errors import ExportError
from training.exporter.comparison import compare_logits
from training.exporter.publish import export_run
from training.models import build_model
from training.models.folding import compute_logits
from training.models.inference_graph import InferenceGraph
from training.models.presets import PRESETS
from training.models.recipes import AirbenchRecipe
from training.run_dir import RunDir
from training.shell_command import format_command
from training.trainer import evaluate_run, load_best_model, train_and_evaluate


def draw_photos(count, *, seed):
    """200x150 pixels of two classes, smooth as photographs are."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    coarse = rng.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    coarse[range(count), ..., labels] |= 128
    images = [np.asarray(Image.fromarray(image).resize((200, 150), Image.Resampling.BICUBIC)) for image in coarse]
    return Split(np.stack(images), labels.astype(np.int64))


DATASETS = {
    "shapes": lambda: Dataset("shapes", "drawn", tuple("abcdefghij"), draw_shapes(60, seed=0), draw_shapes(20, seed=1)),
    "photos": lambda: Dataset("photos", "drawn", ("red", "green"), draw_photos(24, seed=0), draw_photos(6, seed=1)),
}
WAYS = {
    "shapes": {"loop": "fit", "dtype": "mixed_bfloat16"},
    "photos": {"loop": "custom", "dtype": "float32"},
}


@pytest.fixture(scope="module", params=DATASETS)
def trained(request, tmp_path_factory):
    """A run of airbench for an epoch, and its test images."""
    config = TrainingConfig.fill_in(variant="airbench", epochs=1, batch_size=20, **WAYS[request.param])
    run = RunDir.create(tmp_path_factory.mktemp("runs") / request.param, config)
    dataset = DATASETS[request.param]()
    train_and_evaluate(run, dataset)
    return run, dataset.test.images


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export_run(trained[0], models_dir=tmp_path_factory.mktemp("models"))


def test_airbench_is_exported_for_any_image_size(trained, exported):
    (run, images), version = trained, exported
    model = load_best_model(run).model
    expected = compute_logits(model, tf.constant(images)).numpy() / run.read_evaluation()["test"]["temperature"]
    outputs = tf.saved_model.load(str(version)).signatures["serving_default"](images=tf.constant(images))
    np.testing.assert_allclose(outputs["probabilities"], tf.nn.softmax(expected), atol=1e-3)
    info = json.loads((version / "assets.extra" / "model.json").read_text())
    assert info["class_names"] == list(run.read_dataset().class_names)
    assert info["input_shape"] == list(images.shape[1:])
    reference = info["reference"]  # what drift is measured against
    assert reference == run.read_evaluation()["test"]["reference"]
    assert sum(reference["class_shares"]) == pytest.approx(1)
    assert len(reference["class_shares"]) == len(info["class_names"])
    assert 0.4 < reference["mean_typicality"] < 0.6  # of the images that it was fitted on
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "assets.extra/SHA256SUMS"],
        cwd=version,
        capture_output=True,
        text=True,
        check=True,
    )
    listed = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    files = {path.relative_to(version).as_posix() for path in version.rglob("*") if path.is_file()}
    assert listed == files - {"assets.extra/SHA256SUMS"}


def test_exported_run_has_the_guard_of_its_evaluation(trained, exported):
    (run, images), version = trained, exported
    info = json.loads((version / "assets.extra" / "model.json").read_text())
    evaluation = run.read_evaluation()["test"]
    for field in ("typicality", "prediction_sets", "reference"):
        assert info[field] == evaluation[field]
    outputs = tf.saved_model.load(str(version)).signatures["guarded"](images=tf.constant(images))
    assert np.mean(outputs["typicality"] < 0.05) == pytest.approx(info["typicality"]["flagged_test_images"])
    sizes = tf.reduce_sum(tf.cast(outputs["label_set"], tf.int32), axis=1)
    assert np.mean(sizes) == pytest.approx(info["prediction_sets"]["mean_size"])
    report = (run.path / "report.md").read_text()
    assert "## Limits of the predictions" in report
    for plot in ("typicality.png", "atypical.png"):
        assert f"({plot})" in report
        assert (run.path / plot).stat().st_size > 5_000


def forget_guard(run):
    """Leave the evaluation as versions without guards wrote it."""
    evaluation = run.read_evaluation()
    del evaluation["test"]["typicality"], evaluation["test"]["prediction_sets"]
    run.write_evaluation(evaluation)


LOST = {
    "guard.npz is lost": lambda run: run.guard_path(mirror=False).unlink(),
    "guard.npz is damaged": lambda run: run.guard_path(mirror=False).write_bytes(b"PK"),
    "the run was evaluated by an earlier version": forget_guard,
}


@pytest.mark.parametrize("trained", ["shapes"], indirect=True)
@pytest.mark.parametrize("lost", LOST)
def test_run_without_a_guard_is_exported_without_it(trained, tmp_path, caplog, lost):
    run, _ = trained
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    LOST[lost](copy)
    version = export_run(copy, models_dir=tmp_path / "models")
    assert f"without the signatures guarded and guarded_bytes (typicality and prediction sets): {lost}" in (
        caplog.text.replace(f"{copy.path}/", "")
    )
    assert f"To add them: {format_command('evaluate', copy.path)}, then export again" in caplog.text
    signatures = set(tf.saved_model.load(str(version)).signatures)
    assert signatures == {"serving_default", "image_bytes", "probabilities", "labels"}
    assert not {"typicality", "prediction_sets"} & json.loads((version / "assets.extra/model.json").read_text()).keys()


@pytest.mark.parametrize("trained", ["shapes"], indirect=True)
def test_mirrored_export_has_a_guard_of_its_own(trained, tmp_path):
    run, images = trained
    dataset = DATASETS[run.read_dataset().name]()
    mirrored = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    evaluate_run(mirrored, dataset, config=mirrored.read_config(), mirror=True)
    version = export_run(mirrored, models_dir=tmp_path / "models", mirror=True)
    info = json.loads((version / "assets.extra" / "model.json").read_text())
    evaluation = mirrored.read_evaluation()
    for field in ("typicality", "prediction_sets", "reference"):
        assert info[field] == evaluation["mirror"][field]
    assert mirrored.guard_path(mirror=True).read_bytes() != mirrored.guard_path(mirror=False).read_bytes()
    guarded = tf.saved_model.load(str(version)).signatures["guarded"]
    once, flipped = (guarded(images=tf.constant(given))["typicality"] for given in (images, images[:, :, ::-1]))
    np.testing.assert_allclose(once, flipped, atol=1e-3)


def test_folding_error_is_detected_when_all_probabilities_are_0_or_1(trained, tmp_path, monkeypatch):
    run, _ = trained

    fold = AirbenchRecipe.fold

    def fold_badly(*arguments, **options):
        exact = fold(*arguments, **options)
        return InferenceGraph(exact.features, lambda features: 1.001 * exact.head(features))

    monkeypatch.setattr(AirbenchRecipe, "fold", fold_badly)
    with pytest.raises(ExportError, match="the exported graph, at batch size 1, differs from the trained model"):
        export_run(run, models_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"variant": "sequential"}, {"variant": "subclass"}, *({"preset": preset} for preset in PRESETS)]
)
def test_folded_logits_match_within_rounding_at_200x150_pixels(options):
    config = TrainingConfig.fill_in(**{"variant": "airbench", **options})
    model = build_model(config.variant, (150, 200, 3), classes=5, preset=config.preset)
    images = draw_photos(4, seed=0).images
    if config.variant == "airbench":
        model.adapt(images)
        for _ in range(3):
            model(images, training=True)  # moves the batch norms' means and variances
    folded = config.recipe.fold(model, config, temperature=1.0)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    for given in (images, noise):
        expected = compute_logits(model, tf.constant(given)).numpy()
        np.testing.assert_allclose(tf.nn.softmax(expected), model(given), atol=1e-6)
        compare_logits(folded.logits(tf.constant(given)).numpy(), expected, where="folded")
