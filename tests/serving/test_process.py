"""`import_tensorflow`: TensorFlow without Keras, in processes of its own and in the service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serving.conftest import PROJECT, Server

pytestmark = pytest.mark.slow

WITHOUT_KERAS = """
import gc, sys
from serving.process import import_tensorflow
import_tensorflow()
assert "tensorflow" in sys.modules and gc.isenabled()
assert not {"keras", "matplotlib"} & sys.modules.keys()
import keras, tensorflow as tf
assert tf.keras.layers.Dense is keras.layers.Dense
import_tensorflow()
assert sys.modules["keras"] is keras
"""
WITH_KERAS = """
import keras, sys
from serving.process import import_tensorflow
import_tensorflow()
assert sys.modules["keras"] is keras
import tensorflow as tf
assert tf.keras.layers.Dense is keras.layers.Dense
"""


@pytest.mark.parametrize("program", [WITHOUT_KERAS, WITH_KERAS])
def test_keras_is_not_imported_and_can_be_used_as_usual(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [[], ["--workers", "2"]])
def test_the_service_imports_no_keras(
    tmp_path: Path, colours: Path, start_server: Callable[..., Server], options: list[str]
) -> None:
    (tmp_path / "models" / "colours").mkdir(parents=True)
    (tmp_path / "models" / "colours" / "1").symlink_to(colours)
    server = start_server(tmp_path / "models", *options)
    server.wait_for("/readyz")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    pids = children if options else [server.process.pid]
    mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
    mapped = [text for text in mapped if "libtensorflow" in text]  # not the process that checks JSON
    assert len(mapped) == (2 if options else 1)
    assert not any("optree" in text for text in mapped)  # which only Keras needs
