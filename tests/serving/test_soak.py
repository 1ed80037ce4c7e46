"""Half a minute of `make bench-soak`: every attack at least once, under the memory limit of the Kubernetes manifest.

Latency is for `make bench-soak` on a quiet machine; its bar here only catches clients that hang.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.service import PROJECT
from tests.serving.conftest import requires_cgroups
from tests.serving.test_memory_budget import read_memory_limit


@pytest.mark.soak
@requires_cgroups
def test_half_a_minute_of_hostile_and_normal_traffic(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--memory", str(read_memory_limit())]
    command += [
        "--seconds",
        "30",
        "--warm-up-seconds",
        "15",
        "--slice-seconds",
        "1",
        "--max-p99-s",
        "60",
        "--log",
        str(tmp_path / "log"),
        "--",
        "--request-timeout-s",  # on a slow machine, requests of 48 images may wait for half a minute, and are then shed
        "90",
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=290, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
