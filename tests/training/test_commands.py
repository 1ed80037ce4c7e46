"""The commands on a small run: moved data, more epochs, edited and damaged files, failed exports."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from training.__main__ import run_command_line
from training.checkpoints import read_best_state
from training.errors import RunError, StorageFullError, TrainingError
from training.models import build_model
from training.run_dir import RunDir
from training.shell_command import format_command

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "my pictures (2)"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 128, (24, 24, 3), dtype=np.uint8) + (100 if name == "dog" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:02d}.png")
    return folder


def call(*arguments):
    """Run a command in this process, which has TensorFlow loaded already; return its exit code."""
    argv, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["training", *map(str, arguments)]
    try:
        return run_command_line()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(pictures, run, *more):
    options = ["--dataset", "folder", "--data", pictures, "--batch-size", 8, "--loop", "custom", "--run", run]
    return call("train", *options, *more)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train(pictures, run, "--epochs", 3, "--no-export") == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(run, which):
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(run / "checkpoints" / which)))
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith(("weights", "optimizer"))]
    return {name: reader.get_tensor(name) for name in names}


def test_resuming_with_more_epochs_equals_one_longer_run(run, pictures, tmp_path, capfd):
    assert call("train", "--resume", run, "--epochs", 4, "--no-export") == 0
    assert "epoch 3/4" not in capfd.readouterr().err
    assert train(pictures, tmp_path / "whole", "--epochs", 4, "--no-export") == 0
    for which in ("best", "latest"):
        continued, whole = weights(run, which), weights(tmp_path / "whole", which)
        assert continued.keys() == whole.keys()
        for name, value in whole.items():
            np.testing.assert_allclose(continued[name], value, atol=1e-5)
    assert json.loads((run / "config.json").read_text())["epochs"] == 4
    assert len((run / "history.csv").read_text().splitlines()) == 5


def test_fewer_epochs_than_completed_are_rejected(run, capfd):
    before = (run / "config.json").read_bytes()
    assert call("train", "--resume", run, "--epochs", 2, "--no-export") == 1
    assert "has completed 3 epochs, more than the 2 requested" in capfd.readouterr().err
    assert (run / "config.json").read_bytes() == before
    edit(run / "config.json", epochs=1)
    assert call("train", "--resume", run, "--no-export") == 1
    assert "has completed 3 epochs, more than the 1 requested" in capfd.readouterr().err


def test_moved_data_is_recognized_by_its_content(run, pictures, tmp_path, capfd):
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    edit(run / "config.json", data=str(tmp_path / "gone"))
    before = (run / "config.json").read_bytes()
    assert call("evaluate", run) == 1
    assert call("evaluate", run, "--data", moved) == 0
    assert (run / "config.json").read_bytes() == before
    assert call("train", "--resume", run, "--data", moved, "--no-export") == 0
    assert call("evaluate", run) == 0  # the resumed run remembers it
    next((moved / "cat").iterdir()).unlink()
    capfd.readouterr()
    assert call("evaluate", run, "--data", moved) == 1
    assert call("train", "--resume", run, "--data", moved, "--no-export") == 1
    assert capfd.readouterr().err.count("was trained on other data") == 2


def test_other_data_is_rejected_even_if_dataset_json_is_lost(run, pictures, tmp_path, capfd):
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    next((other / "cat").iterdir()).unlink()
    before = (run / "dataset.json").read_bytes()
    (run / "dataset.json").unlink()
    for arguments in (["train", "--no-export", "--epochs", 4, "--resume", run], ["evaluate", run]):
        assert call(*arguments, "--data", other) == 1
        assert "was trained on other data" in capfd.readouterr().err
        assert not (run / "dataset.json").exists()
    assert call("export", run, "--models-dir", tmp_path / "models", "--name", "pets") == 1
    assert format_command("train", "--resume", run) in capfd.readouterr().err
    assert call("train", "--no-export", "--resume", run) == 0  # the run's own data
    assert (run / "dataset.json").read_bytes() == before


def test_unverifiable_data_of_an_earlier_version_is_logged(run, monkeypatch, caplog):
    (run / "dataset.json").unlink()

    def read_without_hash(folder):
        state = read_best_state(folder)
        assert state
        return dataclasses.replace(state, content_hash=None)

    monkeypatch.setattr("training.trainer.read_best_state", read_without_hash)
    assert call("evaluate", run) == 0
    assert "dataset.json is lost: cannot check that" in caplog.text


@pytest.mark.parametrize(("field", "value"), [("learning_rate", 0.5), ("conv_activation", "linear"), ("seed", 4)])
def test_an_edited_config_is_rejected_by_every_command(run, tmp_path, capfd, field, value):
    edit(run / "config.json", **{field: value})
    for arguments in (["evaluate", run], ["export", run, "--models-dir", tmp_path / "models", "--name", "pets"]):
        assert call(*arguments) == 1
        error = capfd.readouterr().err
        assert f"config.json was changed after the checkpoint was written: {field} is {value!r}" in error or (
            field == "seed" and "was trained on other data" in error
        )
    assert call("train", "--resume", run, "--no-export", "--epochs", 4) == 1
    assert not (tmp_path / "models").exists()


def test_an_export_falls_back_to_the_latest_checkpoint_and_deletes_nothing(run, tmp_path, caplog):
    for which in ("best", "latest"):
        (run / "checkpoints" / which / "checkpoint").unlink()
    data = next((run / "checkpoints" / "best").glob("*.data*"))
    data.write_bytes(data.read_bytes()[:100])
    edit(run / "evaluation.json", best={"epoch": 0})  # of another checkpoint than the one exported
    before = tree(run)
    assert call("export", run, "--models-dir", tmp_path / "models", "--name", "pets") == 0
    assert "is damaged" in caplog.text
    assert "using the latest" in caplog.text
    assert "the export has no test metrics" in caplog.text
    assert tree(run) == before
    info = json.loads((tmp_path / "models" / "pets" / "1" / "assets.extra" / "model.json").read_text())
    assert info["best_epoch"] == 3
    assert info["temperature"] == 1.0
    assert "test" not in info


def test_an_export_of_a_run_that_another_process_is_training_disturbs_nothing(run, tmp_path):
    command = [sys.executable, "-m", "training", "train", "--resume", str(run), "--epochs", "9999", "--no-export"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as training:
        assert training.stderr
        try:
            assert any(line.startswith("epoch    5/9999") for line in training.stderr), training.wait()
            # In the first epochs nearly every one is the best so far: its checkpoint is replaced while it is read.
            assert call("export", run, "--models-dir", tmp_path / "models", "--name", "pets") == 0
            epochs = len((run / "history.csv").read_text().splitlines()) - 1
            assert any(line.startswith(f"epoch {epochs + 1:>4}/9999") for line in training.stderr)
            training.terminate()
            assert "keeps its best checkpoint" in training.communicate(timeout=60)[1]
            assert training.returncode == 130
        finally:
            training.kill()
    assert call("evaluate", run) == 0
    info = json.loads((tmp_path / "models" / "pets" / "1" / "assets.extra" / "model.json").read_text())
    best = read_best_state(run / "checkpoints")
    assert best
    assert 3 <= info["best_epoch"] <= best.history[-1].epoch


def test_lost_checkpoints_are_an_error(run, capfd):
    shutil.rmtree(run / "checkpoints")
    assert call("train", "--resume", run, "--no-export") == 1
    assert "has no checkpoint, though 3 epochs were completed" in capfd.readouterr().err
    assert len((run / "history.csv").read_text().splitlines()) == 4


def test_train_and_export_build_the_network_twice_and_read_the_config_once(run, tmp_path, monkeypatch):
    calls = []
    read = RunDir.read_config

    def build_and_count(*args, **kwargs):
        calls.append("build")
        return build_model(*args, **kwargs)

    def read_and_count(run):
        calls.append("read")
        return read(run)

    monkeypatch.setattr("training.trainer.build_model", build_and_count)
    monkeypatch.setattr(RunDir, "read_config", read_and_count)
    assert call("train", "--resume", run, "--models-dir", tmp_path / "models", "--name", "pets") == 0
    assert calls == ["read", "build", "build"]  # to train, and to evaluate and export


def test_invalid_model_name_is_rejected_before_anything_is_written(pictures, tmp_path, capfd):
    assert train(pictures, tmp_path / "run", "--models-dir", tmp_path / "models") == 1
    assert "'my pictures (2)' is not a valid model name" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["notes.txt/run", "notes.txt/a/run"])
def test_a_run_folder_that_cannot_be_made_is_told_before_the_first_step(pictures, tmp_path, capfd, place):
    notes = tmp_path / "notes.txt"
    notes.write_text("a plain file")
    assert train(pictures, tmp_path / place, "--epochs", 1, "--no-export") == RunError.exit_code == 1
    error = capfd.readouterr().err
    assert f"error: the run's folder {tmp_path / place} cannot be made: {notes}: is not a folder" in error
    assert "Choose another with --run" in error
    assert "epoch 1" not in error
    assert tree(tmp_path) == {Path("notes.txt"): b"a plain file"}


def test_runs_that_cannot_be_numbered_are_told_as_well(pictures, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a plain file")
    assert call("train", "--dataset", "folder", "--data", pictures, "--batch-size", 8, "--no-export") == 1
    assert "the run's folder runs cannot be made: runs: is not a folder. Choose another with" in capfd.readouterr().err


def test_the_help_lists_the_exit_codes_of_the_errors(capfd):
    assert call("--help") == 0
    listed = re.search(r"Exit codes: (.*?)\.\n", capfd.readouterr().out, re.DOTALL)
    assert listed
    codes = {int(code) for code in re.findall(r"(?:^|; )(\d+)\s", " ".join(listed[1].split()))}
    error_classes = [TrainingError, *descendants(TrainingError)]
    assert StorageFullError in error_classes
    assert codes == {0, 2, 130} | {error.exit_code for error in error_classes}
    assert TrainingError.__doc__
    for error in error_classes:  # the table in the docstring of their base
        assert re.search(rf"\b{error.__name__} +{error.exit_code}\b", TrainingError.__doc__)


def descendants(error_class):
    return [each for child in error_class.__subclasses__() for each in (child, *descendants(child))]


def test_class_names_that_are_not_utf_8_are_rejected_before_anything_is_written(pictures, tmp_path, capfd):
    folder = tmp_path / "data"
    shutil.copytree(pictures, folder)
    os.rename(os.fsencode(folder / "dog"), os.fsencode(folder) + b"/chien\xe9")  # noqa: PTH104 - no path of text
    assert train(folder, tmp_path / "run", "--no-export") == 1
    error = capfd.readouterr().err
    assert "not UTF-8" in error
    assert "chien\\xe9" in error
    assert not (tmp_path / "run").exists()


def test_failed_export_prints_the_export_command(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        "training.exporter.publish.verify_saved_model",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")),
    )
    models = tmp_path / "my models"
    assert call("train", "--resume", run, "--models-dir", models, "--name", "pets") == 4
    error = capfd.readouterr().err
    command = format_command("export", run, "--models-dir", models, "--name", "pets")
    assert f"is trained and evaluated, but not exported. Export it:  {command}" in error
    assert "Traceback" not in error
    monkeypatch.undo()
    assert call("export", run, "--models-dir", models, "--name", "pets") == 0


def test_the_options_of_the_export_are_in_the_command_that_repeats_it(run, tmp_path, capfd):
    """These images are so small that the last feature map has one pixel, so they have no heat maps."""
    models, outputs = tmp_path / "models", ("--default-outputs", "probabilities")
    options = ["--models-dir", models, "--name", "pets", *outputs]
    assert call("train", "--resume", run, *options, "--explain") == 1
    error = capfd.readouterr().err
    assert "error: heat maps need a feature map of several pixels; this model's has one" in error
    assert "Use larger images (--image-size), or leave out --explain" in error
    assert f"not exported. Export it:  {format_command('export', run, *options, '--explain')}" in error
    assert not models.exists()
    assert call("export", run, *options) == 0
    default = tf.saved_model.load(str(models / "pets" / "1")).signatures["serving_default"]
    assert set(default.structured_outputs) == {"probabilities"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(13, "Permission denied", "/somewhere"), 1, "error: /somewhere: Permission denied"),
        (OSError(28, "No space left on device"), 4, "error: disk full"),
        (MemoryError("5 GiB"), 1, "error: not enough memory (5 GiB)"),
        (ZeroDivisionError("by zero"), 1, "error: unexpected ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_ends_with_a_message_and_a_documented_exit_code(monkeypatch, tmp_path, capfd, error, code, message):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("training.run_dir.RunDir.open", lambda _: (_ for _ in ()).throw(error))
    assert call("export", tmp_path) == code
    error_output = capfd.readouterr().err
    assert message in error_output
    assert "Traceback" not in error_output
    if isinstance(error, ZeroDivisionError):
        (written,) = tmp_path.glob("training-error-*.txt")
        assert str(written) in error_output
        assert "Traceback" in written.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_an_import_catches_is_no_unexpected_error(monkeypatch, tmp_path, capfd, number):
    def open_run(path):
        try:
            signal.raise_signal(number)
        except BaseException:  # as TensorFlow's imports do
            return path.attribute_of_a_module_half_imported
        return None

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("training.run_dir.RunDir.open", open_run)
    assert call("export", tmp_path) == 130
    assert "interrupted (AttributeError: " in capfd.readouterr().err
    assert not list(tmp_path.glob("training-error-*.txt"))
