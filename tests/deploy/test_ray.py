"""The Ray Data job, on a Ray that runs in this process's machine only for the test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.saved_models import save_colour_classifier
from tests.training.batch_prediction.pictures import write_pictures

pytest.importorskip("ray", reason="needs ray, of the extra [ray]")
pytest.importorskip("ray.data")
from pyarrow import parquet

PROJECT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_job_writes_the_rows_of_the_command(tmp_path: Path) -> None:
    model = save_colour_classifier(tmp_path / "colours" / "1", guarded=True)
    write_pictures(tmp_path / "pictures", 100)
    (tmp_path / "list.txt").write_text(
        "".join(f"{path}\n" for path in (*sorted((tmp_path / "pictures").rglob("*.*g")), "missing.png"))
    )

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(PROJECT), "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "1"}
        command = [sys.executable, "-m", module, *arguments, "--batch-size", "16"]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    source = str(tmp_path / "list.txt")
    job = run("deploy.ray.predict", str(model), source, "--out", "rows")
    assert job.returncode == 5, job.stderr
    assert job.stdout.splitlines()[-1] == "wrote 101 rows into rows"
    error = "error: 6 images could not be read: the column error has the reasons"
    assert job.stderr.splitlines()[-1] == error
    assert run("training", "predict", str(model.parent), source, "--out", "expected.parquet").returncode == 5
    rows = parquet.read_table(tmp_path / "rows").sort_by("index")
    expected = parquet.read_table(tmp_path / "expected.parquet")
    assert rows.column_names == expected.column_names
    assert rows.to_pylist() == expected.to_pylist()
    again = run("deploy.ray.predict", str(model), source, "--out", "rows")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == "error: rows has files already: choose another folder"
