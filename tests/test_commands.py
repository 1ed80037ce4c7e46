"""What people type: `make` clears only its own environment, and the documented commands need nothing but `make`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile, a lock file, and a Python that only makes and clears environments, as venv does."""
    shutil.copy(PROJECT / "Makefile", tmp_path / "Makefile")
    (tmp_path / "requirements.lock").touch()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '"-m venv --clear .venv") find -L .venv -mindepth 1 -delete 2>/dev/null\n'
        'mkdir -p .venv/bin && cp "$0" .venv/bin ;;\n'
        "*) ! test -e fail ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    return tmp_path


def make(project: Path, target: str) -> subprocess.CompletedProcess[str]:
    command = ["make", target, f"PYTHON={project}/python"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["install", "clean"])
@pytest.mark.parametrize("kind", ["folder", "link to a folder", "link to one made by make", "file"])
def test_make_leaves_an_environment_alone_that_it_did_not_make(project: Path, target: str, kind: str) -> None:
    folder = project / ("other" if "link" in kind else ".venv")
    kept = folder if kind == "file" else folder / "kept"
    if kind != "file":
        folder.mkdir()
    kept.write_text("mine")
    if "made" in kind:
        (folder / ".made-by-make").touch()
        (folder / ".installed").touch()
        os.utime(folder / ".installed", (0, 0))  # the lock file is newer
    if "link" in kind:
        (project / ".venv").symlink_to(folder)
    done = make(project, target)
    assert kept.read_text() == "mine"
    assert (project / ".venv").is_symlink() == ("link" in kind)
    assert (done.returncode == 0) == (target == "clean")
    assert "not made by make" in done.stderr + done.stdout


def test_make_renews_and_removes_its_own_environment(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / "fail").touch()
    assert make(project, "install").returncode != 0  # the installation fails half-way
    (project / "fail").unlink()
    assert make(project, "install").returncode == 0
    (project / ".venv" / "old").touch()
    assert make(project, "install").returncode == 0
    assert (project / ".venv" / "old").exists()
    os.utime(project / ".venv" / ".installed", (0, 0))
    assert make(project, "install").returncode == 0
    assert not (project / ".venv" / "old").exists()
    assert make(project, "clean").returncode == 0
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(PROJECT)) for p in (PROJECT / "docs").glob("*.md"))]
)
def test_documented_commands_use_the_environment_of_make(page: str) -> None:
    text = (PROJECT / page).read_text()
    assert not re.findall(r"(?<![\w/.-])python3? -m .*", text)
    for module in re.findall(r"\.venv/bin/python -m ([a-z_.]+)", text):
        path = PROJECT / module.replace(".", "/")
        assert module in ("pip", "pytest") or path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
            module
        )


def test_the_readme_names_the_supported_systems() -> None:
    text = (PROJECT / "README.md").read_text()
    assert all(system in text for system in ("Linux", "macOS", "Windows"))
