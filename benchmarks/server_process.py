"""Servers as real processes: started, waited for, and measured from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident_mb(pid: int | str) -> float:
    """Return the memory that a process has in use, in MB (VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


class ServerProcess:
    """A server and its children, in a process group of their own, ended with the block.

    Args:
        command: what to run.
        is_ready: asked until it says so.
        env: beside the environment.
        log: where its output goes.
        cwd: the folder that it runs in; None: this process's.
        cores: that it may use only; all of this process if empty.

    Raises:
        RuntimeError: it ends, or is not ready in two minutes; the end of its log is in the message.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        is_ready: Callable[[], bool],
        env: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        started_s = time.perf_counter()
        if cores:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **env},
                cwd=cwd,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        while not is_ready():
            if self._process.poll() is not None or time.perf_counter() - started_s > 120:
                self.stop()
                raise RuntimeError(f"{' '.join(command)} did not get ready:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.ready_after_s = time.perf_counter() - started_s

    def cpu_s(self) -> float:
        """Return the CPU time that it and its children have used, in seconds."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS

    def memory_mb(self) -> float:
        """Return the memory that it and its children hold, in MB; what they share is counted once (PSS)."""
        total_kb = 0
        for pid in self._pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total_kb += int(line.split()[1])
        return total_kb / 1024

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End it and all its children."""
        pids = self._pids()
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=10)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _pids(self) -> list[int]:
        """Return its process and those that descend from it: some have a session and a group of their own."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(path.name))
        pids = [self._process.pid] if self._process.poll() is None else []
        for pid in pids:
            pids += children.get(pid, [])
        return pids

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
