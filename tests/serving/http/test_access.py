"""Access control in the HTTP protocol: a refused request costs nothing, and its body is not taken for requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.access.tokens import TokenFile
from tests.serving.access.test_http import make_access
from tests.serving.access.test_tokens import hash_of, write
from tests.serving.http.test_protocol import Service, run

POST = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
AUTHORIZED = b"Authorization: Bearer secret\r\n"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n\r\n"


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    return TokenFile(write(tmp_path / "tokens", f"shop predict {hash_of('secret')}"))


@pytest.mark.parametrize(
    ("framing", "begin"),
    [(b"Content-Length: 150000\r\n\r\n", b""), (b"Transfer-Encoding: chunked\r\n\r\n", b"249f0\r\n")],
)
def test_the_body_of_a_refused_upload_is_neither_stored_nor_parsed(
    tokens: TokenFile, framing: bytes, begin: bytes
) -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        client.send(POST + framing + begin + HIDDEN)
        assert (await client.read())[0] == 401
        client.send(HIDDEN * 100)
        assert service.budget.used_bytes == 0
        assert await client.ends()
        assert service.contexts == []  # no request has reached the application
        client.close()

    run(check, access=make_access(tokens))


def test_requests_behind_a_refused_one_get_their_own_responses(tokens: TokenFile) -> None:
    async def check(service: Service) -> None:
        client = await service.connect()
        small = POST + b"Content-Length: 6\r\n\r\nGET /x"
        client.send(small + POST + AUTHORIZED + b"Content-Length: 3\r\n\r\nabc" + small)
        assert [(await client.read())[0] for _ in range(3)] == [401, 200, 401]
        client.close()

    run(check, access=make_access(tokens))


def test_a_body_is_received_after_admission(tokens: TokenFile) -> None:
    """Large, chunked and small bodies: the environ that was made before them gets them."""

    async def check(service: Service) -> None:
        large = b"x" * 1_000_000
        for framing, body in (
            (b"Content-Length: 1000000\r\n\r\n", large),
            (b"Transfer-Encoding: chunked\r\n\r\n", b"f4240\r\n" + large + b"\r\n0\r\n\r\n"),
        ):
            assert await service.send(POST + AUTHORIZED + framing + body) == (200, b"1000000")
        assert await service.send(POST + AUTHORIZED + b"Content-Length: 2\r\n\r\nab") == (200, b"2")

    run(check, access=make_access(tokens))


def test_a_page_of_another_origin_reads_refusals_of_the_server() -> None:
    """413 by the memory budget, 400 by a header: the application does not see these requests."""

    async def check(service: Service) -> None:
        for head in (b"Content-Length: 30000000\r\n\r\n", b"X-Request-Timeout-S: x\r\nContent-Length: 0\r\n\r\n"):
            client = await service.connect()
            client.send(POST + b"Origin: https://app.example.com\r\n" + head)
            response = await client._reader.readuntil(b"\r\n\r\n")
            assert response[9:12] in (b"413", b"400")
            assert response.count(b"Access-Control-Allow-Origin: https://app.example.com\r\n") == 1
            client.close()

    run(check, access=make_access(origins=("https://app.example.com",)), budget_bytes=20_000_000)
