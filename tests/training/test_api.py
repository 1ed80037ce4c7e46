"""The public API of `training`: its names, and the examples in its docstrings."""

import doctest
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import image_formats
import training
from training.config import TrainingConfig
from training.errors import ModelError, RunError
from training.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("blank_plots")


def test_the_public_names_are_pinned():
    functions = ["evaluate", "export", "predict", "train"]
    assert training.__all__ == ["Dataset", "Split", "TrainingConfig", "__version__", *functions]
    assert all(hasattr(training, name) for name in training.__all__)


def test_the_package_is_typed_and_has_the_project_s_version():
    root = Path(training.__file__).parent
    assert (root / "py.typed").is_file()
    assert training.__version__ == image_formats.__version__


def test_importing_the_package_does_not_import_tensorflow():
    program = "import sys, training; training.Dataset, training.TrainingConfig; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_submodules_do_not_replace_the_public_functions():
    import training.exporter.publish
    import training.trainer

    assert all(callable(getattr(training, name)) for name in ("train", "evaluate", "export", "predict"))


def test_the_examples_in_the_docstrings_run(tmp_path, monkeypatch, capsys):
    """In one namespace: the others continue with the run that `train` trains."""
    pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra [batch]")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for function in (training.train, training.evaluate, training.export, training.predict):
        assert function.__doc__
        example = doctest.DocTestParser().get_doctest(function.__doc__, names, function.__name__, None, None)
        runner = doctest.DocTestRunner()
        assert example.examples
        assert runner.run(example, clear_globs=False).failed == 0, capsys.readouterr().out
        names = example.globs
    assert (tmp_path / "runs" / "shapes" / "report.md").is_file()
    assert (tmp_path / "models" / "shapes" / "1" / "saved_model.pb").is_file()


def mean_colour(images):
    """Return the mean of each channel as probabilities."""
    return tf.nn.softmax(tf.reduce_mean(images, axis=(1, 2)))


def test_a_model_is_exported_like_a_run(tmp_path, caplog):
    caplog.set_level(logging.INFO, "training")
    labels = ["red", "green", "blue"]
    version = training.export(
        mean_colour, tmp_path, name="colours", labels=labels, input_scale="-1..1", image_size=(6, 8), color="rgb"
    )
    assert version == tmp_path / "colours" / "1"
    for inferred in ("outputs: softmax of 3 classes", "input scale: -1..1, as given; colour rgb", "features: none"):
        assert inferred in caplog.text
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    outputs = tf.saved_model.load(str(version)).signatures["serving_default"](images=tf.constant(images))
    np.testing.assert_allclose(outputs["probabilities"], mean_colour(images.astype(np.float32) / 127.5 - 1), atol=1e-6)
    info = json.loads((version / "assets.extra" / "model.json").read_text())
    assert info["imported"]["source"] == "the function mean_colour"
    assert (info["temperature"], info["class_names"]) == (1.0, labels)
    with pytest.raises(ModelError, match=r"was exported by this program already: copy the folder to MODELS_DIR/NAME"):
        training.export(version, tmp_path, labels="a,b,c")


def test_a_run_takes_no_options_of_a_model_and_a_model_no_mirror(tmp_path):
    RunDir.create(tmp_path / "run", TrainingConfig())
    with pytest.raises(RunError, match="is a run, which has its own settings: leave out labels, color"):
        training.export(tmp_path / "run", labels=["a", "b"], color="rgb")
    with pytest.raises(RunError, match="is not a run directory"):
        training.export(tmp_path / "nothing")
    with pytest.raises(ModelError, match="mirror is for runs"):
        training.export(mean_colour, tmp_path, mirror=True)
