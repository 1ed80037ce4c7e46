import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.shell_command import format_command

PROJECT = Path(__file__).parents[2]


def test_python_of_the_virtual_environment_is_a_relative_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert format_command("evaluate", Path("my runs/1")) == ".venv/bin/python -m training evaluate 'my runs/1'"


def test_command_runs_without_python_on_the_path():
    environment = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        ["/bin/sh", "-c", format_command("train", "--resume", "nowhere")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "nowhere is not a run directory" in done.stderr


@pytest.mark.parametrize("package", ["training", "serving", "client"])
def test_messages_do_not_name_bare_python(package):
    for path in (PROJECT / package).rglob("*.py"):
        tree = ast.parse(path.read_text())
        # Docstrings are for who reads the code, and click's usage line is not a command to copy.
        unseen = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr | ast.keyword)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in unseen]
        assert not [node.value for node in texts if "python -m" in str(node.value)], path
