"""Clients of others that cannot be installed beside the service: an environment and a script for each.

`make test-clients` runs this module: it creates the environments in build/clients/, starts the service, runs every
script against it, and prints which version of which client was tested.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.clients.service import IMAGE_FILE, make_server

PROJECT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
BUILD = PROJECT / "build" / "clients"
SCRIPT_TIMEOUT_S = 120
# Installed beside the service; tests/clients/test_*.py are the tests.
LIGHT_CLIENTS = ("tritonclient", "tensorflow-serving-api", "grpcio-reflection")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with a client in the version that its requirements name."""

    name: str  # of the package

    @property
    def requirements(self) -> Path:
        return FOLDER / "requirements" / f"{self.name}.txt"

    @property
    def script(self) -> Path:
        """Gets the base URL, the gRPC address and an image file as arguments; fails with an exception."""
        return FOLDER / "scripts" / f"run_{self.name.replace('-', '_')}.py"

    @property
    def folder(self) -> Path:
        return BUILD / self.name

    @property
    def version(self) -> str:
        """The version that the requirements name."""
        lines = (line.split(" ; ")[0].split("==") for line in self.requirements.read_text().splitlines())
        return dict(lines)[self.name]

    @property
    def is_installed(self) -> bool:
        """Whether the environment is there, and made from these requirements."""
        installed = self.folder / "installed.txt"
        return installed.exists() and installed.read_text() == self.requirements.read_text()

    def install(self) -> None:
        """Create the environment, unless it is there."""
        if self.is_installed:
            return
        print(f"installing {self.name} {self.version} into {self.folder.relative_to(PROJECT)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        install = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, "-r", str(self.requirements)], check=True)
        (self.folder / "installed.txt").write_text(self.requirements.read_text())

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def run(self, url: str, grpc_address: str, image: Path) -> subprocess.CompletedProcess[str]:
        """Run the script in the environment."""
        command = [self.python, str(self.script), url, grpc_address, str(image)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SCRIPT_TIMEOUT_S)


ENVIRONMENTS = [Environment(file.stem) for file in sorted((FOLDER / "requirements").glob("*.txt"))]


def main() -> int:
    """Test every client in its environment; returns 1 if one fails."""
    for environment in ENVIRONMENTS:
        environment.install()
    failed = []
    with tempfile.TemporaryDirectory() as folder, make_server(Path(folder)) as server:
        for environment in ENVIRONMENTS:
            done = environment.run(server.url, server.grpc_address, Path(folder) / IMAGE_FILE)
            print(f"{environment.name:<24} {environment.version:<12} {'failed' if done.returncode else 'passed'}")
            if done.returncode:
                failed.append(environment.name)
                print(done.stdout + done.stderr)
    for name in LIGHT_CLIENTS:
        print(f"{name:<24} {version(name):<12} tested by `make test`")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
