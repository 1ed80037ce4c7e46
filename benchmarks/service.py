"""`python -m serving` as a process, in a memory cgroup or not."""

from __future__ import annotations

import contextlib
import re
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.server_process import ServerProcess, free_port, resident_mb

PROJECT = Path(__file__).parents[1]


class Service:
    """The service from its readiness to the end of the block.

    Args:
        models: the models folder.
        log: where its output goes.
        options: of its command line.
        cores: that it may use only; all of this process if empty.
        cgroup: where it runs; None for that of this process.

    Raises:
        RuntimeError: it does not start; the end of its log is in the message.
    """

    def __init__(
        self,
        models: Path,
        log: Path,
        *options: str,
        cores: Sequence[int] = (),
        cgroup: MemoryCgroup | None = None,
    ) -> None:
        port, grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.grpc_address = f"127.0.0.1:{grpc_port}"
        self.log = log
        self.cgroup = cgroup
        command = [sys.executable, "-m", "serving", "--models-dir", str(models), "--rest-port", str(port)]
        command += ["--grpc-port", str(grpc_port), *options]
        self._process = ServerProcess(
            cgroup.wrap(command) if cgroup else command,
            is_ready=self.is_ready,
            env={"PYTHONPATH": str(PROJECT), "TF_CPP_MIN_LOG_LEVEL": "3"},
            log=log,
            cores=cores,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/readyz", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def is_alive(self) -> bool:
        """Whether its process runs, and none in its cgroup was killed for lack of memory."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z" and not (self.cgroup and self.cgroup.oom_kills())

    def resident_mb(self) -> float:
        """Return its resident memory now."""
        return resident_mb(self.pid)

    def reset_peak(self) -> None:
        """Let `peak_mb` count from now on."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """Return the largest resident memory since `reset_peak`."""
        high = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(high[1]) / 1024 if high else 0.0

    def describe_end(self) -> str:
        """Say how it ended."""
        kills = self.cgroup.oom_kills() if self.cgroup else 0
        how = f"killed for going over {self.cgroup.limit_bytes:,} bytes" if self.cgroup and kills else "ended"
        return f"the service was {how}:\n{self.log.read_text(errors='replace')[-1500:]}"

    def stop(self) -> None:
        """End it; its cgroup stays."""
        with contextlib.suppress(ProcessLookupError):
            self._process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
