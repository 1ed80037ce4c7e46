"""Whose request it is: behind proxies, in an IPv6 network, on this machine."""

from __future__ import annotations

import pytest

from serving.access.peers import TrustedProxies, group_address, is_loopback, read_grpc_peer
from serving.errors import StartupError


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("10.0.0.1", "", "10.0.0.1"),
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # not a trusted proxy
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "192.0.2.66, 198.51.100.1", "198.51.100.1"),  # what the client itself has sent is left of it
        ("10.0.0.1", "192.0.2.66, 198.51.100.1,10.2.3.4 , 2001:db8::5", "198.51.100.1"),  # through three proxies
        ("10.0.0.1", "10.1.1.1, 10.2.2.2", "10.1.1.1"),  # all trusted
        ("10.0.0.1", "198.51.100.1:4711", "198.51.100.1"),
        ("2001:db8::5", "[2001:db9::1]:4711", "2001:db9::1"),
        ("10.0.0.1", "198.51.100.1, unknown", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.1, ", "10.0.0.1"),
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("", "198.51.100.1", ""),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_not_trusted(peer: str, forwarded_for: str, client: str) -> None:
    assert TrustedProxies("10.0.0.0/8, 2001:db8::5").find_client(peer, forwarded_for) == client


def test_all_proxies_trusted_or_none() -> None:
    assert TrustedProxies("*").find_client("203.0.113.9", "192.0.2.1, 198.51.100.1") == "192.0.2.1"
    assert TrustedProxies("*").find_client("", "198.51.100.1") == "198.51.100.1"  # a Unix socket
    assert TrustedProxies("").find_client("10.0.0.1", "198.51.100.1") == "10.0.0.1"
    assert not TrustedProxies("").are_any


@pytest.mark.parametrize("text", ["proxy.example.com", "10.0.0.1/8", "10.0.0.0/40", "10.0.0.1;10.0.0.2"])
def test_invalid_proxies(text: str) -> None:
    with pytest.raises(StartupError, match="--forwarded-allow-ips takes addresses and networks"):
        TrustedProxies(text)


def test_ipv6_networks_share_a_limit() -> None:
    assert group_address("2001:db8:1:2:3:4:5:6") == group_address("2001:db8:1:2::1") == "2001:db8:1:2::/64"
    assert group_address("2001:db8:1:3::1") != group_address("2001:db8:1:2::1")
    assert group_address("::ffff:198.51.100.1") == group_address("198.51.100.1") == "198.51.100.1"
    assert group_address("") == ""


@pytest.mark.parametrize(
    ("peer", "address", "is_local"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1", True),
        ("ipv6:%5B::1%5D:5000", "::1", True),
        ("ipv6:[::ffff:127.0.0.1]:5000", "::ffff:127.0.0.1", True),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::1%eth0", False),
        ("ipv4:198.51.100.1:5000", "198.51.100.1", False),
        ("unix:/run/serving", "", False),
    ],
)
def test_grpc_peers(peer: str, address: str, is_local: bool) -> None:
    assert read_grpc_peer(peer) == address
    assert is_loopback(address) == is_local


def test_loopback_hosts() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.9.9.9", "::1", "localhost.example.com", "")] == [
        True,
        True,
        True,
        False,
        False,
    ]
