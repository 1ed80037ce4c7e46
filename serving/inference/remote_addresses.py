"""The addresses of --remote: parsed from the option, and resolved to those of the backends."""

from __future__ import annotations

import logging
import re
import socket
import time

from serving.errors import StartupError

logger = logging.getLogger(__name__)

RESOLVE_INTERVAL_S = 5.0  # Kubernetes' DNS caches the addresses of a headless Service for as long

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s\[\]:/,]+):(?P<port>\d{1,5})")


def parse_addresses(text: str) -> tuple[tuple[str, int], ...]:
    """Return the hosts and ports of "HOST:PORT[,HOST:PORT...]", in their order.

    Raises:
        StartupError: an address is malformed or repeated.
    """
    addresses = []
    for part in text.split(","):
        match = _ADDRESS.fullmatch(part.strip())
        port = int(match["port"]) if match else 0
        if match is None or not 1 <= port <= 65_535:
            raise StartupError(
                f"--remote: expected HOST:PORT, or several separated by commas, such as tf1:8500,tf2:8500 or "
                f"[::1]:8500; got {text!r}"
            )
        addresses.append((match["host"].strip("[]"), port))
    if repeated := sorted({f"{host}:{port}" for host, port in addresses if addresses.count((host, port)) > 1}):
        raise StartupError(f"--remote: {', '.join(repeated)} is given more than once; give each backend once")
    return tuple(addresses)


class AddressResolver:
    """The current addresses of the backends: every address of every host, by DNS where it is a name."""

    def __init__(self, text: str) -> None:
        self._hosts = parse_addresses(text)
        self._resolved: dict[tuple[str, int], tuple[str, ...]] = {}
        self._problems: dict[tuple[str, int], str] = {}
        self._next_s = 0.0

    def resolve(self) -> tuple[str, ...]:
        """Return the addresses as "10.0.0.1:8500" or "[::1]:8500", sorted.

        Names are looked up again after RESOLVE_INTERVAL_S. A name that cannot be resolved keeps its last addresses.
        """
        if time.monotonic() >= self._next_s:
            for host, port in self._hosts:
                self._look_up(host, port)
            self._next_s = time.monotonic() + RESOLVE_INTERVAL_S
        return tuple(sorted({address for found in self._resolved.values() for address in found}))

    @property
    def problem(self) -> str:
        """The names that could not be resolved, and why; empty if there is none."""
        return "; ".join(self._problems.values())

    def _look_up(self, host: str, port: int) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            problem = f"{host} cannot be resolved: {error.strerror or error}"
            if self._problems.get((host, port)) != problem:
                logger.warning("--remote: %s", problem)
            self._problems[host, port] = problem
            return
        self._problems.pop((host, port), None)
        # A host with addresses of both kinds is one backend, not two.
        family = socket.AF_INET if any(each[0] == socket.AF_INET for each in found) else socket.AF_INET6
        hosts = {str(each[4][0]) for each in found if each[0] == family}
        addresses = tuple(sorted(f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts))
        if self._resolved.get((host, port), addresses) != addresses:
            logger.info("%s:%d is now %s", host, port, ", ".join(addresses))
        self._resolved[host, port] = addresses
