"""Addresses of clients: behind trusted proxies, in the same network, on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Container
from functools import lru_cache
from urllib.parse import unquote

from serving.errors import StartupError

# Any of these tells that the request came through a proxy, so that its sender is not known to be on this machine.
PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class TrustedProxies:
    """The proxies whose X-Forwarded-For is believed: addresses and networks, separated by commas; * for all.

    Raises:
        StartupError: an entry is neither.
    """

    def __init__(self, text: str) -> None:
        entries = [entry.strip() for entry in text.split(",") if entry.strip()]
        self._trusts_all = "*" in entries
        try:
            self._networks = tuple(ipaddress.ip_network(entry) for entry in entries if entry != "*")
        except ValueError as error:
            raise StartupError(
                f"--forwarded-allow-ips takes addresses and networks such as 10.0.0.0/8, separated by commas: {error}"
            ) from error
        self.are_any = bool(entries)
        self._cached = lru_cache(maxsize=4096)(self._compare)

    def trusts(self, address: str) -> bool:
        """Return whether the peer with this address is a trusted proxy."""
        return self._cached(address)

    def _compare(self, address: str) -> bool:
        if self._trusts_all:
            return True
        parsed = parse_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)

    def find_client(self, peer: str, forwarded_for: str) -> str:
        """Return the address of the client.

        Each proxy appends the address that it was called from, so the entries are read from the right: the first one
        that is not a trusted proxy is the client, and what is left of it may be invented.

        Args:
            peer: the address of the connection.
            forwarded_for: the values of X-Forwarded-For, joined by commas.
        """
        client = peer
        for entry in reversed(forwarded_for.split(",")):
            if not self.trusts(client):
                break
            address = without_port(entry.strip())
            if parse_address(address) is None:
                break
            client = address
        return client


@lru_cache(maxsize=4096)
def parse_address(text: str) -> _IPAddress | None:
    """Parse an IP address, an IPv4 address in an IPv6 one as the former; None if it is not one."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address


@lru_cache(maxsize=4096)
def group_address(text: str) -> str:
    """Return the group of addresses that share a rate limit: an IPv4 address, or the /64 network of an IPv6 address."""
    address = parse_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address or text)


def is_loopback(host: str) -> bool:
    """Return whether a host, a name or an address without a port, is this machine itself."""
    address = parse_address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def is_proxied(headers: Container[str]) -> bool:
    """Return whether headers, by their lower-case names, tell that a request came through a proxy."""
    return any(name in headers for name in PROXY_HEADERS)


def read_grpc_peer(peer: str) -> str:
    """Return the address in a gRPC peer such as `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`; "" without one."""
    kind, _, rest = peer.partition(":")
    return without_port(unquote(rest)) if kind in ("ipv4", "ipv6") else ""


def without_port(text: str) -> str:
    """Return a host without its port, and an IPv6 address without its brackets."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
