"""The memory limit of the container or machine, and the resident set of this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from serving import process_memory
from serving.process_memory import memory_limit_bytes, resident_bytes

MB = 1024 * 1024


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """Fake /proc/self/cgroup and the files of /sys/fs/cgroup."""

    def redirect(*parts: str) -> Path:
        path = Path(*parts)
        return tmp_path / path.relative_to("/") if path.is_absolute() and tmp_path not in path.parents else path

    def lay_out(membership: str, files: dict[str, str]) -> None:
        for name, text in {"proc/self/cgroup": membership, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(process_memory, "Path", redirect)

    return lay_out


CGROUP = "sys/fs/cgroup"
Layout = Callable[[str, dict[str, str]], None]


def test_cgroup_v2_uses_the_smallest_limit_of_all_ancestors(system: Layout) -> None:
    files = {
        f"{CGROUP}/a/b/memory.max": "max\n",
        f"{CGROUP}/a/memory.max": "300000000\n",
        f"{CGROUP}/memory.max": "500000000\n",
        f"{CGROUP}/other/memory.max": "1000\n",
    }
    system("0::/a/b\n", files)
    assert memory_limit_bytes() == 300_000_000


def test_cgroup_v2_with_a_private_namespace(system: Layout) -> None:
    system("0::/\n", {f"{CGROUP}/memory.max": "200000000\n"})
    assert memory_limit_bytes() == 200_000_000


def test_cgroup_v1(system: Layout) -> None:
    files = {
        f"{CGROUP}/memory/docker/abc/memory.limit_in_bytes": "250000000\n",
        f"{CGROUP}/memory/memory.limit_in_bytes": "9223372036854771712\n",  # unlimited
        f"{CGROUP}/cpu/docker/abc/memory.limit_in_bytes": "1\n",
    }
    system("4:cpu,cpuacct:/docker/abc\n9:name=systemd:/docker/abc\n3:memory:/docker/abc\n", files)
    assert memory_limit_bytes() == 250_000_000


def test_cgroup_v1_without_a_visible_path(system: Layout) -> None:
    files = {f"{CGROUP}/memory/memory.limit_in_bytes": "260000000\n"}
    system("3:hugetlb,memory:/kubepods/burstable/pod1/c\n", files)
    assert memory_limit_bytes() == 260_000_000


def test_cgroups_of_both_versions(system: Layout) -> None:
    files = {
        f"{CGROUP}/memory/a/memory.limit_in_bytes": "270000000\n",
        f"{CGROUP}/unified/a/memory.max": "280000000\n",
    }
    system("3:memory:/a\n0::/a\n", files)
    assert memory_limit_bytes() == 270_000_000


@pytest.mark.parametrize("membership", ["", "nonsense\n", "3:memory\n", "0::/\n"])
def test_without_a_cgroup_limit_the_machine_memory_is_used(system: Layout, membership: str) -> None:
    system(membership, {f"{CGROUP}/memory.max": "max\n"})
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert memory_limit_bytes() == total


def test_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        process_memory, "Path", lambda *parts: tmp_path.joinpath(*(str(part).lstrip("/") for part in parts))
    )
    assert resident_bytes() == 0
    assert memory_limit_bytes() > 0


def test_free_bytes_is_the_limit_minus_the_resident_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "memory_limit_bytes", lambda: 1_000)
    monkeypatch.setattr(process_memory, "resident_bytes", lambda: 400)
    assert process_memory.free_bytes() == 450  # with a margin
    assert process_memory.free_bytes(processes=2) == 75  # of its half
    monkeypatch.setattr(process_memory, "resident_bytes", lambda: 1_400)
    assert process_memory.free_bytes() == 0


def test_resident_bytes_grows_with_an_allocation() -> None:
    before = resident_bytes()
    block = bytearray(b"x") * (64 * MB)
    assert resident_bytes() - before > 48 * MB
    del block
