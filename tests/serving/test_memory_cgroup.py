"""The memory cgroups that other tests use."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from benchmarks.memory_cgroup import MemoryCgroup, parse_bytes
from tests.serving.conftest import requires_cgroups

TAKE = "import sys, time; data = b'x' * int(sys.argv[1]); print(len(data), flush=True); time.sleep(float(sys.argv[2]))"


def take(cgroup: MemoryCgroup, count: int, *, seconds: float = 0) -> subprocess.Popen[bytes]:
    command = cgroup.wrap([sys.executable, "-c", TAKE, str(count), str(seconds)])
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@requires_cgroups
def test_only_a_process_over_the_limit_is_killed() -> None:
    with MemoryCgroup(200_000_000) as cgroup:
        assert take(cgroup, 100_000_000).wait(timeout=30) == 0
        assert cgroup.oom_kills() == 0
        peak = cgroup.peak_bytes()
        assert peak is None or 100_000_000 < peak <= 200_000_000
        assert take(cgroup, 400_000_000).wait(timeout=30) == -signal.SIGKILL
        assert cgroup.oom_kills() == 1


@requires_cgroups
def test_removing_the_cgroup_kills_its_processes() -> None:
    with MemoryCgroup(200_000_000) as cgroup:
        process = take(cgroup, 50_000_000, seconds=60)
        assert process.stdout
        assert process.stdout.readline() == b"50000000\n"
        assert cgroup.usage_bytes() > 50_000_000
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert not cgroup.path.exists()


@pytest.mark.parametrize(
    ("text", "count"), [("2Gi", 2**31), ("2G", 2 * 10**9), ("512Mi", 2**29), ("100K", 100_000), ("1000", 1_000)]
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "2 Gi", "2T", "-1", "1.5G", "many"])
def test_parse_bytes_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="expected an amount of memory"):
        parse_bytes(text)
