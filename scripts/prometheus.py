"""A stock Prometheus with the configuration of deploy/observability/, for a test and for the dashboard's picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from serving.server_process import free_ports

OBSERVABILITY = Path(__file__).parents[1] / "deploy" / "observability"
START_TIMEOUT_S = 60.0


class Prometheus:
    """Prometheus in a process of its own, scraping one service; a context manager.

    Args:
        target: host:port of the service.
        folder: for its data and its configuration: that of deploy/observability/, with other intervals and target.
        interval: between two scrapes, and between two evaluations of the rules.
    """

    def __init__(self, target: str, folder: Path, *, interval: str = "1s") -> None:
        config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
        config["rule_files"] = [str(OBSERVABILITY / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        self._folder = folder
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self._folder}/prometheus.yml",
                    f"--storage.tsdb.path={self._folder}/data",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def get(self, path: str, **parameters: str | float) -> Any:
        """Return the data of a response of Prometheus's HTTP API; raises ValueError for an error of it."""
        document = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        if document["status"] != "success":
            raise ValueError(f"{path} {parameters}: {document['error']}")
        return document["data"]

    def wait_until_scraped(self) -> None:
        """Wait until the service was scraped and every rule evaluated; raises TimeoutError with the log."""
        end_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_scraped():
            if time.monotonic() > end_s or self._process.poll() is not None:
                raise TimeoutError((self._folder / "prometheus.log").read_text())
            time.sleep(0.1)

    def _is_scraped(self) -> bool:
        try:
            if httpx.get(f"{self.url}/-/ready").status_code != 200:
                return False
        except httpx.TransportError:
            return False
        targets = [target["health"] for target in self.get("targets")["activeTargets"]]
        rules = [rule["health"] for group in self.get("rules")["groups"] for rule in group["rules"]]
        return set(targets) == {"up"} and bool(rules) and "unknown" not in rules


def find_missing() -> str | None:
    """Return what is missing to run Prometheus, or None."""
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found (Debian: apt install prometheus)" if missing else None


def read_panels() -> list[dict[str, Any]]:
    """Return the panels of the Grafana dashboard, rows included."""
    panels: list[dict[str, Any]] = json.loads((OBSERVABILITY / "dashboard.json").read_text())["panels"]
    return panels


def fill_in(expression: str, *, rate_interval: str) -> str:
    """Replace the dashboard's variables in a query, as Grafana does; every job, instance and model is selected."""
    return re.sub(r"\$(job|instance|model)\b", ".*", expression.replace("$__rate_interval", rate_interval))
