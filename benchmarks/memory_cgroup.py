"""A memory cgroup with a limit for one process, as a container runtime makes it: cgroup v2 where it can be, else v1.

The limit includes swap where the kernel counts swap, so that a process over its limit is killed instead of swapped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

_ROOT = Path("/sys/fs/cgroup")
_numbers = itertools.count()

# The files of the two versions for the same values.
_V1 = {"limit": "memory.limit_in_bytes", "swap": "memory.memsw.limit_in_bytes", "usage": "memory.usage_in_bytes"}
_V1 |= {"peak": "memory.max_usage_in_bytes", "oom": "memory.oom_control"}
_V2 = {"limit": "memory.max", "swap": "memory.swap.max", "usage": "memory.current"}
_V2 |= {"peak": "memory.peak", "oom": "memory.events"}

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class CgroupsUnavailableError(Exception):
    """No memory cgroup can be made here; the message says why."""


class MemoryCgroup:
    """A new memory cgroup; the end of the block kills what still runs in it and removes it.

    Args:
        limit_bytes: the processes in it are killed when they need more together.

    Raises:
        CgroupsUnavailableError: none can be made here.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.path, self._files = _make_group()
        try:
            (self.path / self._files["limit"]).write_text(str(limit_bytes))
            swap = self.path / self._files["swap"]
            if swap.exists():
                # Version 1 limits memory and swap together, version 2 swap alone.
                swap.write_text(str(limit_bytes) if self._files is _V1 else "0")
        except OSError as error:
            self.path.rmdir()
            raise CgroupsUnavailableError(f"no limit can be set in {self.path}: {error.strerror}") from error

    def wrap(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs `command` in this cgroup, from its first instruction on, with the same PID."""
        enter = f'echo $$ > "{self.path}/cgroup.procs" && exec "$@"'
        return ["/bin/sh", "-c", enter, "sh", *command]

    def usage_bytes(self) -> int:
        """Return what the processes hold now, the page cache of their files included."""
        return int((self.path / self._files["usage"]).read_text())

    def peak_bytes(self) -> int | None:
        """Return the most they have held; None where the kernel does not tell (version 2 before Linux 5.19)."""
        peak = self.path / self._files["peak"]
        return int(peak.read_text()) if peak.exists() else None

    def oom_kills(self) -> int:
        """Return how many processes were killed for going over the limit."""
        counter = re.search(r"^oom_kill (\d+)$", (self.path / self._files["oom"]).read_text(), re.MULTILINE)
        return int(counter[1]) if counter else 0

    def remove(self) -> None:
        """Kill what still runs in it, and remove it.

        Raises:
            OSError: processes are still in it after ten seconds.
        """
        until_s = time.monotonic() + 10
        while True:
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.path.rmdir()
                return
            except OSError:
                if time.monotonic() > until_s:
                    raise
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def why_unavailable() -> str | None:
    """Say why no memory cgroup can be made here; None where one can."""
    try:
        MemoryCgroup(2**30).remove()
    except CgroupsUnavailableError as error:
        return str(error)
    return None


def parse_bytes(text: str) -> int:
    """Read an amount of memory as Kubernetes and Docker write it: `2Gi`, `2G`, `512M`, `1000000`.

    Raises:
        ValueError: it is none.
    """
    amount = re.fullmatch(r"(\d+)([KMG]i?)?", text.strip())
    if not amount:
        raise ValueError(f"expected an amount of memory such as 2Gi, 512M or 1000000, not {text!r}")
    return int(amount[1]) * _UNITS[amount[2] or ""]


def _make_group() -> tuple[Path, dict[str, str]]:
    """Make a cgroup whose memory can be limited."""
    name = f"serving-benchmark-{os.getpid()}-{next(_numbers)}"
    reason = "neither cgroup v2 nor the memory controller of cgroup v1 is mounted at /sys/fs/cgroup"
    for parent, files in _find_parents():
        path = parent / name
        try:
            path.mkdir()
        except OSError as error:
            reason = f"no cgroup can be made in {parent}: {error.strerror}"
            continue
        if (path / files["limit"]).exists() and os.access(path / "cgroup.procs", os.W_OK):
            return path, files
        path.rmdir()
        reason = f"the memory controller is not delegated to {parent}"
    raise CgroupsUnavailableError(reason)


def _find_parents() -> list[tuple[Path, dict[str, str]]]:
    """List where a cgroup may be made: v2 from our own group up to the root, then v1."""
    parents: list[tuple[Path, dict[str, str]]] = []
    controllers = _ROOT / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), "/")
        group = _ROOT / own.strip("/")
        parents += [(path, _V2) for path in (group, *group.parents) if path.is_dir() and path.is_relative_to(_ROOT)]
    if (_ROOT / "memory" / _V1["limit"]).exists():
        parents.append((_ROOT / "memory", _V1))
    return parents
