"""Containers started as in production, through docker's command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

IMAGE = os.environ.get("CONTAINER_IMAGE", "")
# As OpenShift runs a container: a user that the image does not know, in the root group.
RANDOM_USER = "1000620000:0"
HARDENED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
    *("--pids-limit", "512", "--tmpfs", "/tmp:size=64m"),
)
# Of the volume, and of the process that `init: true` starts first.
MOUNT_POINTS = ("/models", "/sbin/docker-init", "/usr/sbin/docker-init")
STARTED_WITHIN_S = 300.0
# A connection that the container did not accept; any other error is a request that failed.
NOT_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout)


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def why_not() -> str | None:
    """Return why containers cannot be run here, or None."""
    if not IMAGE:
        return "CONTAINER_IMAGE names no image; `make test-containers` builds one"
    if shutil.which("docker") is None:
        return "docker is not installed"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return "the docker daemon cannot be reached"
    return None


def wait_until(condition: Callable[[], bool], what: str, *, within_s: float = STARTED_WITHIN_S) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"within {within_s:.0f} s: {what}"
        time.sleep(0.2)


class Container:
    """A running container, by its name or id."""

    def __init__(self, name: str) -> None:
        self.name = name

    def inspect(self) -> dict[str, Any]:
        (described,) = json.loads(docker("inspect", self.name))
        return dict(described)

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.inspect()["State"])

    @property
    def url(self) -> str:
        """The HTTP API at the container's own address: no proxy accepts connections for it while it stops."""
        (network,) = self.inspect()["NetworkSettings"]["Networks"].values()
        return f"http://{network['IPAddress']}:8501"

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def is_healthy(self) -> bool:
        return bool(self.state["Health"]["Status"] == "healthy")

    def run_python(self, code: str) -> str:
        return docker("exec", self.name, "/venv/bin/python", "-c", code)

    def kill_from_outside(self) -> None:
        """SIGKILL the main process as the kernel would, so that the restart policy applies: not to `docker kill`."""
        code = f"import os; os.kill({self.state['Pid']}, 9)"
        docker("run", "--rm", "--pid=host", "--user=0", "--entrypoint=/venv/bin/python", IMAGE, "-c", code)

    def written_files(self) -> list[str]:
        """Return the changes in the container's own layer, without the mount points that the engine makes."""
        changes = docker("diff", self.name).splitlines()
        return [line for line in changes if not any(f"{path}/".startswith(line[2:] + "/") for path in MOUNT_POINTS)]


class HardenedContainer(Container):
    """A container of the image on a folder of models, removed at the end."""

    def __init__(self, models: Path, *, memory: str, arguments: tuple[str, ...] = ()) -> None:
        limits = ("--memory", memory, "--memory-swap", memory, "--user", RANDOM_USER)
        mount = ("--volume", f"{models}:/models:ro")
        super().__init__(docker("run", "--detach", *HARDENED, *limits, *mount, IMAGE, *arguments))

    def __enter__(self) -> Self:
        try:
            wait_until(self.is_ready, "the container is ready")
        except AssertionError:
            logs = self.logs()
            self.__exit__()
            raise AssertionError(logs) from None
        return self

    def __exit__(self, *exception: object) -> None:
        docker("rm", "--force", self.name)

    def logs(self) -> str:
        done = subprocess.run(["docker", "logs", self.name], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


@dataclass
class Outcome:
    """What became of one request: a response, or the error of the connection."""

    sent_s: float
    done_s: float
    status: int | None
    retry_after: str | None
    error: httpx.TransportError | None


@dataclass
class Load:
    """Threads that each send the same request over one connection until they are stopped, or cannot connect.

    Args:
        url: of the request.
        content: its body.
        content_type: of the body.
        threads: requests at a time.
    """

    url: str
    content: bytes
    content_type: str = "image/png"
    threads: int = 8
    outcomes: list[Outcome] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(self.threads)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def statuses(self) -> set[int | None]:
        return {outcome.status for outcome in self.outcomes}

    def _send(self) -> None:
        headers = {"Content-Type": self.content_type}
        with httpx.Client(timeout=httpx.Timeout(120, connect=10)) as client:
            while not self._stopping.is_set():
                sent_s = time.monotonic()
                status = retry_after = failure = None
                try:
                    response = client.post(self.url, content=self.content, headers=headers)
                    status, retry_after = response.status_code, response.headers.get("Retry-After")
                except httpx.TransportError as error:
                    failure = error
                self.outcomes.append(Outcome(sent_s, time.monotonic(), status, retry_after, failure))
                if isinstance(failure, NOT_CONNECTED):
                    return
