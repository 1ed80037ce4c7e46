"""The Host header: required, never the cause of a 500, and never redirects to another host."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.serving.conftest import Server
from tests.serving.http.conftest import ALIVE, HEALTH, Client, Response, error_of, request

PATHS = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/predict",
    "/v1/models/colours",
    "/v1/models/colours/",
    "/v2",
    "/v2/",
    "/v2/models/colours/",
    "/v2//",
    "/v2/models//colours",
    "//healthz",
    "/static/page.css",
    "//static//page.css",
    "/nowhere",
    "//nowhere//",
    "*",
]
REFUSED = {
    "none": b"",
    "two": b"Host: a\r\nHost: b\r\n",
    "the same twice": b"Host: a\r\nHost: a\r\n",
    "two, one empty": b"Host: a\r\nHost:\r\n",
    "two, apart": b"Host: a\r\nAccept: */*\r\nhOST: a\r\n",
    "under another name": b"X-Forwarded-Host: a\r\nHosts: a\r\n",
    "list of empty names": b"Host: ,\r\n",
    "list": b"Host: a, b\r\n",
}
STRANGE = {
    "empty": b"",
    "empty label": b"a..b",
    "dot": b".",
    "leading dot": b".a",
    "bracket": b"[",
    "brackets": b"[]",
    "bracket at the end": b"]",
    "invalid address": b"[::g]:80",
    "address": b"[::1]:8501",
    "address zone": b"[fe80::1%25eth0]",
    "space": b"a b",
    "tab": b"a\tb",
    "not UTF-8": b"xn--\xff",
    "bad punycode": b"xn--a",
    "empty punycode": b"xn--",
    "umlaut": "b\u00fccher.example".encode(),
    "long label": b"a" * 64 + b".example",
    "long": b"a." * 2_000 + b"example",
    "very long": b"a" * 30_000,
    "userinfo": b"user:secret@a",
    "userinfo only": b"@",
    "path": b"a/b",
    "backslash": b"a\\b",
    "query": b"a?b#c",
    "scheme": b"http://a",
    "port": b"a:99999999999999999999",
    "negative port": b"a:-1",
    "empty port": b"a:",
    "letters in port": b"a:b",
    "colon": b":",
    "colons": b"a:1:2",
    "percent": b"%00%ff%",
    "quotes": b"\"'<script>",
    "underscore": b"a_b",
}


def get(path: str, host_lines: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return method + b" " + path.encode("latin-1") + b" HTTP/" + version + b"\r\n" + host_lines + b"\r\n"


@pytest.fixture(autouse=True)
def _server_still_works(server: Server) -> Iterator[None]:
    yield
    assert request(server, HEALTH).body == ALIVE


@pytest.mark.parametrize("lines", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_http_1_1_requires_exactly_one_host(server: Server, method: str, lines: bytes) -> None:
    for path in ("/", "/healthz", "/nowhere", "http://x/healthz"):
        with Client(server.port) as client:
            client.send(get(path, lines, method.encode()))
            response = client.read(method)
            assert (response.status, response.closes) == (400, True), (path, response)
            if method != "HEAD":
                assert "Host" in error_of(response)
            assert client.read_to_end() == b""


@pytest.mark.parametrize("path", ["/healthz", "http://x/healthz", "http://x:80/healthz"])
def test_http_1_0_requires_no_host(server: Server, path: str) -> None:
    assert request(server, get(path, b"", version=b"1.0")).body == ALIVE
    assert request(server, get(path, b"Host: x\r\n", version=b"1.0")).body == ALIVE


@pytest.mark.parametrize("host", STRANGE.values(), ids=STRANGE)
def test_an_unusual_host_causes_no_server_error(server: Server, host: bytes) -> None:
    for path in PATHS:
        for version in (b"1.1", b"1.0"):
            response = request(server, get(path, b"Host: " + host + b"\r\n", version=version))
            assert response.status < 500, (path, response)
            assert response.headers.get("location", "/").isprintable()


@pytest.mark.parametrize("host", [b"a..b", b"[", b"a b", b"xn--\xff", b"user:secret@a"])
@pytest.mark.parametrize("path", ["/predict", "/v1/models/colours:predict", "/v2/models/colours/infer"])
def test_an_unusual_host_causes_no_server_error_for_inference(server: Server, path: str, host: bytes) -> None:
    lines = b"Host: " + host + b"\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
    assert request(server, get(path, lines, b"POST") + b"{}").status in (400, 415)


ELSEWHERE = [
    "//evil.example",
    "//evil.example/",
    "//evil.example/path",
    "//evil.example/%2e%2e",
    "//evil.example/..",
    "//evil.example/healthz",
    "//evil.example//healthz",
    "///evil.example/healthz",
    "////evil.example",
    "/\\evil.example",
    "/\\evil.example/healthz",
    "\\\\evil.example",
    "/%5cevil.example",
    "/%5c%5cevil.example/healthz",
    "/%2fevil.example",
    "/%2f%2fevil.example/healthz",
    "/v2/..//evil.example//",
    "/.//evil.example",
    "/..//evil.example",
    "/%09/evil.example",
    "/%0d%0aLocation:%20http://evil.example",
    "/healthz/%0d%0aSet-Cookie:%20a=b",
    "//evil.example/v2",
    "//v2//",
    "/v2//",
    "//v2",
    "//healthz",
    "//user@evil.example/healthz",
    "//healthz@evil.example",
    "//v2/models//colours",
    "//evil.example//v2//",
    "//static//..//evil.example",
    "//v1//models//colours",
    "/v1//models/colours",
    "/v1/models//colours",
    "//v1/models/colours/",
    "//predict",
    "/predict/",
    "//?url=//evil.example",
    "//static//page.css",
    "http://evil.example//healthz",
    "http://evil.example/v2//",
    "http://evil.example",
    "https:evil.example",
    "http:///evil.example",
]


@pytest.mark.parametrize("path", ELSEWHERE)
def test_no_path_redirects_to_another_host(server: Server, path: str) -> None:
    lines = b"Host: here.example:8501\r\nContent-Length: 0\r\nConnection: close\r\n"
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        with Client(server.port) as client:
            client.send(get(path, lines, method.encode()))
            response = client.read(method)
            assert client.read_to_end() == b""
        assert response.status < 500, (method, response)
        check_location(response)
        assert "set-cookie" not in response.headers


def check_location(response: Response) -> None:
    for name in ("location", "content-location", "refresh"):
        target = response.headers.get(name, "/").replace("\\", "/")
        assert urlsplit(target).netloc in ("", "here.example:8501"), response.headers
        assert not target.startswith("//"), response.headers
        assert "://" not in target or target.startswith("http://here.example:8501/"), response.headers
