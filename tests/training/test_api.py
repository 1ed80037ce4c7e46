"""The public API of `training`: its names, and the examples in its docstrings."""

import doctest
import subprocess
import sys
from pathlib import Path

import image_formats
import training


def test_the_public_names_are_pinned():
    assert training.__all__ == ["Dataset", "Split", "TrainingConfig", "__version__", "evaluate", "export", "train"]
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

    assert all(callable(getattr(training, name)) for name in ("train", "evaluate", "export"))


def test_the_examples_in_the_docstrings_run(tmp_path, monkeypatch, capsys):
    """In one namespace: `evaluate` and `export` continue with the run that `train` trains."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for function in (training.train, training.evaluate, training.export):
        assert function.__doc__
        example = doctest.DocTestParser().get_doctest(function.__doc__, names, function.__name__, None, None)
        runner = doctest.DocTestRunner()
        assert example.examples
        assert runner.run(example, clear_globs=False).failed == 0, capsys.readouterr().out
        names = example.globs
    assert (tmp_path / "runs" / "shapes" / "report.md").is_file()
    assert (tmp_path / "models" / "shapes" / "1" / "saved_model.pb").is_file()
