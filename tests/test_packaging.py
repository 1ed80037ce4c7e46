"""The distribution: its version, console scripts and type information."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import client
import image_formats

PROJECT = Path(__file__).parents[1]
PACKAGES = ("training", "serving", "client", "image_formats")
SCRIPTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]


def test_every_command_has_a_console_script() -> None:
    assert set(SCRIPTS) == {"image-classifier-training", "image-classifier-serving", "image-classifier-client"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_console_scripts_run(name: str) -> None:
    entry_point = EntryPoint(name, SCRIPTS[name], "console_scripts")
    program = (
        "import sys; from importlib.metadata import EntryPoint; "
        f"sys.argv = [{name!r}, '--help']; sys.exit(EntryPoint({name!r}, {entry_point.value!r}, 'scripts').load()())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {name} [OPTIONS]")


def test_version_is_known_without_an_installation() -> None:
    assert client.__version__ == image_formats.__version__
    assert all(part.isdecimal() for part in client.__version__.split("."))


def test_wheel_has_the_version_the_scripts_and_the_type_information(tmp_path: Path) -> None:
    for name in PACKAGES:
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, tmp_path)
    program = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        files = wheel.namelist()
        (scripts,) = (wheel.read(name).decode() for name in files if name.endswith("/entry_points.txt"))
    assert path.name.startswith(f"image_classifier_serving-{client.__version__}-")
    assert scripts.split("\n")[1:-1] == [f"{name} = {SCRIPTS[name]}" for name in sorted(SCRIPTS)]
    typed = {folder.name for folder in PROJECT.iterdir() if (folder / "py.typed").exists()}
    assert {name.split("/")[0] for name in files if name.endswith("/py.typed")} == typed >= {"client"}
