"""Labelled images show the input scale, calibrate and evaluate: the command, its report and model.json."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image

from tests.training.test_commands import call
from training.errors import ModelError
from training.importer.choice import choose, evaluate_candidates
from training.importer.preprocessing import Preprocessing

BRIGHT, DARK = (0.53, 0.58), (0.43, 0.48)  # red, of 0..1


def build(slope=60.0):
    """Return a network on 0..1 that calls images bright or dark by their red channel, at a half."""
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(1, 1), layers.GlobalAveragePooling2D(), layers.Dense(2)]
    )
    first, *_, last = model.layers
    first.set_weights([np.array([1, 0, 0], np.float32).reshape(1, 1, 3, 1), np.array([-0.5], np.float32)])
    last.set_weights([np.array([[slope, -slope]], np.float32), np.zeros(2, np.float32)])
    return model


def draw(folder, counts=(("bright", BRIGHT), ("dark", DARK)), *, per_class=40, wrong=0):
    """Draw images of each class; in the first `wrong` of them, the red of the other class."""
    rng = np.random.default_rng(0)
    for (name, own), (_, other) in zip(counts, reversed(counts), strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            low, high = other if number < wrong else own
            red = rng.uniform(low, high, (8, 8))
            pixels = np.stack([red, rng.random((8, 8)), rng.random((8, 8))], axis=-1)
            Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The output of the command, and its folder with models/ and runs/."""
    folder = tmp_path_factory.mktemp("import")
    build().save(folder / "brightness.keras")
    draw(folder / "photos", wrong=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.MonkeyPatch.context() as output:
            lines: list[str] = []
            output.setattr("click.echo", lambda text="", **_: lines.append(str(text)))
            assert call("import", "brightness.keras", "--data", "photos", "--models-dir", "models") == 0
    return folder, "\n".join(lines)


def test_everything_inferred_is_told_on_a_line_each(imported):
    _, output = imported
    for line in (
        r"model          brightness\.keras \(Sequential\), 8 weights",
        r"input          8x8 colour, float32 \(n, 8, 8, 3\)",
        r"outputs        logits of 2 classes",
        r"labels         bright, dark, the folders of the images, sorted",
        r"input scale    0\.\.1, colour rgb: the best of 9 on 40 images \(--input-scale 0\.\.1 --color rgb\)",
        r"features       \(n, 8, 8, 1\), .*",
        r"calibration    temperature \d+\.\d{3}, fitted on 40 images",
        r"test accuracy  \d\d\.\d\d% of 40 other images, loss \d\.\d{4}",
        r"label sets     \d+\.\d% have the true label, \d\.\d\d labels on average",
        r"report         runs/import-brightness/report\.md",
        r"exported       models/brightness/1",
    ):
        assert re.search(f"^{line}$", output, re.MULTILINE), line


def test_the_export_has_labels_metrics_and_temperature(imported):
    folder, _ = imported
    version = folder / "models" / "brightness" / "1"
    info = json.loads((version / "assets.extra" / "model.json").read_text())
    assert info["class_names"] == ["bright", "dark"]
    assert info["input_shape"] == [8, 8, 3]
    assert info["imported"]["input_scale"] == "0..1"
    assert info["dataset"]["test_images"] == info["dataset"]["calibration_images"] == 40
    assert info["temperature"] > 1.5  # a tenth of its confident answers are wrong
    assert info["calibration"]["expected_calibration_error"] < info["uncalibrated_error"]
    images = np.full((3, 8, 8, 3), 10, np.uint8)
    images[1:, :, :, 0] = 145
    outputs = tf.saved_model.load(str(version)).signatures["serving_default"](images=tf.constant(images))
    logits = build().predict(images.astype(np.float32) / 255, verbose=0) / info["temperature"]
    np.testing.assert_allclose(outputs["probabilities"], tf.nn.softmax(logits), atol=1e-5)
    assert outputs["label"].numpy().tolist() == [b"dark", b"bright", b"bright"]
    guarded = tf.saved_model.load(str(version)).signatures["guarded"](images=tf.constant(images))
    np.testing.assert_allclose(guarded["probabilities"], outputs["probabilities"], atol=1e-6)
    assert guarded["label_set"].shape == (3, 2)
    assert info["prediction_sets"]["coverage"] > 0.7
    assert info["typicality"]["auroc"].keys()
    assert info["reference"]["images"] == 40
    assert sum(info["reference"]["class_shares"]) == pytest.approx(1)
    files = tf.constant([tf.io.encode_png(image).numpy() for image in images])
    decoded = tf.saved_model.load(str(version)).signatures["image_bytes"](image_bytes=files)
    np.testing.assert_allclose(decoded["probabilities"], outputs["probabilities"], atol=1e-6)


def test_the_report_has_what_a_runs_report_has(imported):
    folder, _ = imported
    run = folder / "runs" / "import-brightness"
    text = (run / "report.md").read_text()
    assert text.startswith("# brightness: ")
    assert "Imported from brightness.keras (Sequential)" in text
    assert "| --input-scale 0..1 --color rgb | " in text
    assert "fitted on 40 other images" in text
    assert "| input scale | 0..1 |" in text
    assert "| calibration images | 40 |" in text
    assert "## By class" in text
    for plot in ("confusion", "calibration", "samples", "typicality", "atypical"):
        assert f"({plot}.png)" in text
        assert (run / f"{plot}.png").is_file()
    assert "loss.png" not in text
    evaluation = json.loads((run / "evaluation.json").read_text())["test"]
    assert evaluation["count"] == 40
    assert np.sum(evaluation["confusion"]) == 40


@pytest.mark.usefixtures("blank_plots")
def test_train_and_test_folders_are_calibrated_on_half_of_the_test_images(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    build().save("brightness.keras")
    draw(tmp_path / "photos" / "train", per_class=2)
    draw(tmp_path / "photos" / "test", per_class=30)
    options = ["--data", "photos", "--labels", "dark,bright,neither", "--input-scale", "0..1"]
    assert call("import", "brightness.keras", *options) == 1
    assert "has 2 classes (logits of 2 classes), and --labels has 3" in explain(capfd)
    options[3] = "bright,dark"
    assert call("import", "brightness.keras", *options) == 0
    output = capfd.readouterr().out
    assert "fitted on 30 images" in output
    assert "100.00% of 30 other images" in output
    assert "input scale    0..1, as given; colour rgb" in output


def explain(capfd):
    return " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "dark,bright"], "none is clearly more accurate on these 12 images than always naming the most"),
        (["--labels", "dark,light"], "has the classes bright, which are not among the 2 labels, dark, light"),
        (["--data", "three"], "the model has 2 classes, and three has 3: a, bright, dark. Give the model's labels"),
        (["--data", "none"], "none cannot be read as a folder: No such file or directory"),
        (["--data", "lonely"], "the test images of lonely have a single image of 'bright'; at least 2 of each class"),
    ],
    ids=["labels in the wrong order", "unknown folder", "other number of classes", "missing", "one test image"],
)
def test_data_that_does_not_fit_the_model(tmp_path, monkeypatch, capfd, options, message):
    monkeypatch.chdir(tmp_path)
    build().save("brightness.keras")
    draw(tmp_path / "photos", per_class=12)
    draw(tmp_path / "three", per_class=3)
    draw(tmp_path / "three", (("a", DARK),), per_class=3)
    draw(tmp_path / "lonely" / "train", per_class=3)
    draw(tmp_path / "lonely" / "test", per_class=1)
    data = [] if "--data" in options else ["--data", "photos"]
    assert call("import", "brightness.keras", *options, *data) == 1
    assert message in explain(capfd)
    assert not (tmp_path / "models").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("blank_plots")
def test_grey_images_show_the_scale_but_not_the_order_of_the_colours(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    build().save("brightness.keras")
    draw(tmp_path / "photos")
    for path in (tmp_path / "photos").rglob("*.png"):
        with Image.open(path) as image:
            image.getchannel("R").save(path)
    assert call("import", "brightness.keras", "--data", "photos", "--name", "grey") == 0
    expected = "input scale    0..1, colour rgb, which grey images do not show: the best of 5 on 40 images"
    assert expected in capfd.readouterr().out


CANDIDATES = [
    Preprocessing(scale, color, "nhwc", "float32") for scale in ("0..1", "0..255") for color in ("rgb", "bgr")
]


def evaluate_shares(shares, *, count=200):
    """Return candidates whose predictions are right, with some confidence, for these shares of the images."""
    labels = np.arange(count) % 2
    rng = np.random.default_rng(0)

    def predict(preprocessing, images):
        share = shares[CANDIDATES.index(preprocessing)]
        own = np.where(rng.random(len(images)) < share, 0.8, 0.2)
        return np.where(np.arange(2) == labels[:, None], own[:, None], 1 - own[:, None])

    return evaluate_candidates(CANDIDATES, predict, np.zeros((count, 1, 1, 3), np.uint8), labels), labels


def test_the_clearly_best_scale_is_chosen():
    assert choose(*evaluate_shares([0.5, 0.6, 0.95, 0.4])) == CANDIDATES[2]


def test_a_close_second_prints_the_table_and_stops():
    with pytest.raises(ModelError) as caught:
        choose(*evaluate_shares([0.5, 0.9, 0.9, 0.4]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "the input scale is not clear from the images:"
    assert lines[1].split() == ["options", "accuracy", "loss"]
    assert len(lines) == 2 + len(CANDIDATES) + 1
    assert all(re.fullmatch(r"  --input-scale \S+ --color \S+ +\d+\.\d\d% +\d\.\d{4}", line) for line in lines[2:-1])
    assert re.match(r"none is clearly best on these 200 images; --input-scale .* comes too close. Give the", lines[-1])


def test_confidence_without_accuracy_is_not_better():
    """A scale with larger values gives larger logits: the same classes, and a lower loss where all are right."""
    labels = np.arange(200) % 2
    shares = np.random.default_rng(0).uniform(0.6, 0.9, 200)

    def predict(preprocessing, images):
        own = np.full(len(images), 0.9999) if preprocessing == CANDIDATES[2] else shares
        return np.where(np.arange(2) == labels[:, None], own[:, None], 1 - own[:, None])

    with pytest.raises(ModelError, match="none is clearly best"):
        choose(evaluate_candidates(CANDIDATES, predict, np.zeros((200, 1, 1, 3), np.uint8), labels), labels)


def test_chance_is_not_a_choice():
    with pytest.raises(ModelError, match=r"none is clearly more accurate .* than always naming the most frequent"):
        choose(*evaluate_shares([0.5, 0.45, 0.55, 0.4]))


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "pets").write_text("a plain file")
    assert call("import", "missing.keras", "--name", "pets") == 1
    error = explain(capfd)
    assert "the model cannot be exported into models/pets: models/pets is not a writable folder" in error
    assert error.endswith("Choose another with --models-dir")
