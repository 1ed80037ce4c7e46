"""`HttpAccess` on the environ of requests, with real tokens and policies, without a server."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from serving.access.cors import CorsPolicy
from serving.access.http import TOKEN_NAME, HttpAccess
from serving.access.model_folders import ModelFolders
from serving.access.peers import TrustedProxies
from serving.access.policy import AccessPolicy
from serving.access.rate_limit import RateLimiter
from serving.access.tokens import TokenFile
from serving.errors import StartupError
from serving.http.wsgi import Response
from tests.serving.access.test_tokens import hash_of, write

LOAD = "/v2/repository/models/colours/load"


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    lines = (f"shop predict {hash_of('p')}", f"ops admin {hash_of('a')}", f"both predict,admin {hash_of('b')}")
    return TokenFile(write(tmp_path / "tokens", *lines))


def make_access(
    tokens: TokenFile | None = None,
    *,
    rate_limit: float | None = None,
    proxies: str = "",
    origins: tuple[str, ...] = (),
    prefix: str = "",
    metrics_public: bool = False,
    allow_remote_reload: bool = False,
) -> HttpAccess:
    policy = AccessPolicy(
        tokens,
        RateLimiter(rate_limit) if rate_limit else None,
        TrustedProxies(proxies),
        ModelFolders([Path("models")]),
        allow_remote_reload=allow_remote_reload,
    )
    return HttpAccess(policy, CorsPolicy(origins) if origins else None, prefix=prefix, metrics_public=metrics_public)


def make_environ(method: str, path: str, *, peer: str = "198.51.100.1", **headers: str) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SCRIPT_NAME": "",
        "REMOTE_ADDR": peer,
        "wsgi.url_scheme": "http",
        "HTTP_HOST": "localhost:8501",
        **{f"HTTP_{name}": value for name, value in headers.items()},
    }


def bearer(token: str) -> str:
    return f"Bearer {token}"


def basic(token: str) -> str:
    return "Basic " + base64.b64encode(f"any:{token}".encode()).decode()


def status_of(response: Response | None) -> int:
    """The status, or 0 for an admitted request."""
    return int(response.status[:3]) if response else 0


def headers_of(response: Response | None) -> dict[str, str]:
    assert response
    return dict(response.headers)


def send(access: HttpAccess, method: str, path: str, **options: str) -> int:
    return status_of(access.admit(make_environ(method, path, **options)))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 0),
        ("HEAD", "/readyz", 0),
        ("GET", "/v2/health/live", 0),
        ("GET", "/v2/health/ready", 0),
        ("POST", "/healthz", 401),
        ("OPTIONS", "/healthz", 401),
        ("GET", "/healthz/", 401),
        ("GET", "//healthz", 401),
        ("GET", "/HEALTHZ", 401),
        ("GET", "/v2/health/live/../../v2", 401),
        ("GET", "/", 401),
        ("GET", "/metrics", 401),
        ("GET", "/static/page.js", 401),
        ("OPTIONS", "/v1/models/colours", 401),
        ("GET", "/nothing", 401),
        ("GET", "", 401),
        ("POST", LOAD, 401),
    ],
)
def test_only_health_is_open(tokens: TokenFile, method: str, path: str, status: int) -> None:
    assert send(make_access(tokens), method, path) == status


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Bearer x", "bearer P", "p", "Token p", "Basic", "Basic !", "Basic cA==", basic("x")],
)
def test_wrong_missing_and_malformed_tokens_get_the_same_response(tokens: TokenFile, authorization: str) -> None:
    access = make_access(tokens)
    nothing = access.admit(make_environ("POST", "/predict"))
    response = access.admit(make_environ("POST", "/predict", AUTHORIZATION=authorization))
    assert response == nothing
    assert response
    assert headers_of(response)["WWW-Authenticate"] == 'Bearer realm="serving"'
    assert b"a valid token is required" in response.body


def test_a_token_is_accepted_as_bearer_and_as_password(tokens: TokenFile) -> None:
    access = make_access(tokens)
    for authorization in (bearer("p"), "bearer  p", "BEARER p", basic("p")):
        environ = make_environ("POST", "/predict", AUTHORIZATION=authorization)
        assert access.admit(environ) is None
        assert environ[TOKEN_NAME] == "shop"


def test_scopes(tokens: TokenFile) -> None:
    access = make_access(tokens)
    admitted = {
        (token, path): send(access, "POST", path, AUTHORIZATION=bearer(token)) == 0
        for token in "pab"
        for path in ("/predict", "/v2/repository/index", LOAD, LOAD[:-4] + "unload", LOAD + "/", LOAD[:-4] + "x\n/load")
    }
    assert {path for (token, path), is_admitted in admitted.items() if is_admitted and token == "p"} == {
        "/predict",
        "/v2/repository/index",
    }
    assert not admitted["a", "/predict"]
    assert all(admitted["a", path] for path in (LOAD, LOAD[:-4] + "unload"))
    assert all(is_admitted for (token, _), is_admitted in admitted.items() if token == "b")
    response = access.admit(make_environ("POST", LOAD, AUTHORIZATION=bearer("p")))
    assert response
    assert response.status == "403 Forbidden"
    assert b"the token shop does not have the scope admin" in response.body


def test_health_knows_its_caller(tokens: TokenFile) -> None:
    access = make_access(tokens)
    for authorization, name in ((bearer("p"), "shop"), (bearer("x"), ""), ("", "")):
        environ = make_environ("GET", "/readyz", AUTHORIZATION=authorization)
        assert access.admit(environ) is None
        assert environ[TOKEN_NAME] == name


def test_public_metrics(tokens: TokenFile) -> None:
    for path in ("/metrics", "/monitoring/prometheus/metrics"):
        assert send(make_access(tokens, metrics_public=True), "GET", path) == 0
        assert send(make_access(tokens), "GET", path, AUTHORIZATION=bearer("p")) == 0


def test_browsers_are_asked_for_a_password_and_pages_of_others_cannot_use_it(tokens: TokenFile) -> None:
    access = make_access(tokens)
    response = access.admit(make_environ("GET", "/", ACCEPT="text/html,application/xml"))
    assert response
    challenges = [value for name, value in response.headers if name == "WWW-Authenticate"]
    assert challenges == ['Bearer realm="serving"', 'Basic realm="serving", charset="UTF-8"']
    own = {"ORIGIN": "http://localhost:8501", "SEC_FETCH_SITE": "same-origin"}
    assert send(access, "POST", "/predict", AUTHORIZATION=basic("p"), **own) == 0
    for foreign in (
        {"ORIGIN": "https://evil.example"},
        {"ORIGIN": "null"},
        {"SEC_FETCH_SITE": "cross-site"},
        {"SEC_FETCH_SITE": "same-site", "ORIGIN": "http://localhost:8501"},
    ):
        assert send(access, "POST", "/predict", AUTHORIZATION=basic("p"), **foreign) == 403
        assert send(access, "POST", "/predict", AUTHORIZATION=bearer("p"), **foreign) == 0


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"peer": "127.0.0.1"}, 0),
        ({"peer": "::1"}, 0),
        ({"peer": "198.51.100.1"}, 403),
        ({"peer": ""}, 403),
        ({"peer": "127.0.0.1", "X_FORWARDED_FOR": "127.0.0.1"}, 403),  # by a proxy on this machine
        ({"peer": "127.0.0.1", "FORWARDED": "for=127.0.0.1"}, 403),
        ({"peer": "127.0.0.1", "VIA": "1.1 proxy"}, 403),
        ({"peer": "127.0.0.1", "HOST": "evil.example"}, 403),  # a name that was made to point here
        ({"peer": "127.0.0.1", "ORIGIN": "https://evil.example"}, 403),  # a page in a browser on this machine
        ({"peer": "127.0.0.1", "SEC_FETCH_SITE": "cross-site"}, 403),
    ],
)
@pytest.mark.parametrize("proxies", ["", "127.0.0.1"])
def test_without_tokens_only_local_callers_change_the_models(
    options: dict[str, str], status: int, proxies: str
) -> None:
    access = make_access(proxies=proxies)
    assert send(access, "POST", LOAD, **options) == status
    assert send(access, "POST", "/predict", **options) == 0
    assert send(make_access(proxies=proxies, allow_remote_reload=True), "POST", LOAD, **options) == 0


def test_the_rate_limit_is_per_token_and_else_per_address(tokens: TokenFile) -> None:
    access = make_access(tokens, rate_limit=1.0, proxies="10.0.0.1")
    assert [send(access, "GET", "/", AUTHORIZATION=bearer("p")) for _ in range(2)] == [0, 429]
    assert send(access, "GET", "/", AUTHORIZATION=bearer("p"), peer="198.51.100.2") == 429
    assert send(access, "GET", "/", AUTHORIZATION=bearer("b")) == 0
    assert [send(access, "GET", "/", AUTHORIZATION=bearer("guess")) for _ in range(2)] == [401, 429]
    assert send(access, "GET", "/", AUTHORIZATION=bearer("guess"), peer="198.51.100.2") == 401
    for _ in range(3):
        assert send(access, "GET", "/healthz") == 0
    headers = headers_of(access.admit(make_environ("GET", "/", AUTHORIZATION=bearer("p"))))
    assert headers["Retry-After"] == "1"
    # Without tokens: the address that a trusted proxy names.
    access = make_access(rate_limit=1.0, proxies="10.0.0.1")
    clients = ("192.0.2.1", "192.0.2.2", "192.0.2.1", "2001:db8::1", "2001:db8::2")
    statuses = [send(access, "GET", "/", peer="10.0.0.1", X_FORWARDED_FOR=client) for client in clients]
    assert statuses == [0, 0, 429, 0, 429]


def test_a_trusted_proxy_tells_address_and_scheme() -> None:
    access = make_access(proxies="10.0.0.0/8")
    forwarded = {"X_FORWARDED_FOR": "192.0.2.1", "X_FORWARDED_PROTO": "https"}
    environ = make_environ("GET", "/", peer="10.0.0.1", **forwarded)
    access.admit(environ)
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"]) == ("192.0.2.1", "https")
    environ = make_environ("GET", "/", peer="198.51.100.1", **forwarded)
    access.admit(environ)
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"]) == ("198.51.100.1", "http")
    environ = make_environ("GET", "/", peer="10.0.0.1", X_FORWARDED_PROTO="javascript", X_FORWARDED_PREFIX="/x")
    access.admit(environ)
    assert (environ["wsgi.url_scheme"], environ["SCRIPT_NAME"]) == ("http", "")


def test_a_prefix(tokens: TokenFile) -> None:
    for access, outside in ((make_access(prefix="/models-api"), 404), (make_access(tokens, prefix="/models-api"), 401)):
        environ = make_environ("GET", "/models-api/v2", AUTHORIZATION=bearer("p"))
        assert access.admit(environ) is None
        assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/models-api", "/v2")
        for path in ("/healthz", "/models-api/healthz"):  # probes call the process, not the proxy
            environ = make_environ("GET", path)
            assert access.admit(environ) is None
            assert environ["PATH_INFO"] == "/healthz"
        for path in ("/v2", "/models-apix/v2", "/models-api2"):
            assert send(access, "GET", path) == outside
            assert send(access, "GET", path, AUTHORIZATION=bearer("p")) == 404
        redirect = access.admit(make_environ("GET", "/models-api", AUTHORIZATION=bearer("p")))
        assert status_of(redirect) == 308
        assert headers_of(redirect)["Location"] == "/models-api/"
    # The prefix does not hide what a path is.
    assert send(make_access(tokens, prefix="/x"), "POST", "/x" + LOAD, AUTHORIZATION=bearer("p")) == 403


PREFLIGHT = {
    "ORIGIN": "https://app.example.com",
    "ACCESS_CONTROL_REQUEST_METHOD": "POST",
    "ACCESS_CONTROL_REQUEST_HEADERS": "authorization,content-type",
}


def test_preflight_requests_need_no_token(tokens: TokenFile) -> None:
    access = make_access(tokens, origins=("https://app.example.com", "http://localhost:3000"))
    response = access.admit(make_environ("OPTIONS", "/v1/models/colours:predict", **PREFLIGHT))
    assert status_of(response) == 200
    headers = headers_of(response)
    assert headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert headers["Vary"] == "Origin"
    assert "Access-Control-Allow-Credentials" not in headers
    for changed in ({"ORIGIN": "https://evil.example"}, {"ORIGIN": "https://app.example.com.evil.example"}):
        response = access.admit(make_environ("OPTIONS", "/v2", **{**PREFLIGHT, **changed}))
        assert status_of(response) == 401
        assert "Access-Control-Allow-Origin" not in headers_of(response)
    assert send(access, "POST", "/v2", **PREFLIGHT) == 401
    assert send(access, "OPTIONS", "/v2", ORIGIN="https://app.example.com") == 401  # not a preflight request
    bad = {**PREFLIGHT, "ACCESS_CONTROL_REQUEST_HEADERS": "a\r\nb: c"}
    assert "Access-Control-Allow-Headers" not in headers_of(access.admit(make_environ("OPTIONS", "/v2", **bad)))


def test_a_page_of_an_allowed_origin_can_read_refusals(tokens: TokenFile) -> None:
    access = make_access(tokens, origins=("https://app.example.com",))
    headers = headers_of(access.admit(make_environ("POST", "/predict", ORIGIN="https://app.example.com")))
    assert headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert "Retry-After" in headers["Access-Control-Expose-Headers"]
    assert headers_of(access.admit(make_environ("POST", "/predict")))["Vary"] == "Origin"
    any_origin = make_access(tokens, origins=("*",))
    headers = headers_of(any_origin.admit(make_environ("POST", "/predict", ORIGIN="null")))
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert "Vary" not in headers


def test_without_cors_an_options_request_reaches_the_app() -> None:
    access = make_access(proxies="10.0.0.1")
    assert access.admit(make_environ("OPTIONS", "/v1/models/colours:predict", **PREFLIGHT)) is None


@pytest.mark.parametrize(
    "origin", ["app.example.com", "https://app.example.com/", "https://APP.example.com", "null", "https://*.example"]
)
def test_invalid_origins(origin: str) -> None:
    with pytest.raises(StartupError, match="--cors-origin takes a scheme and a host in lower case"):
        CorsPolicy([origin])


def test_access_control_without_work_is_left_out(tokens: TokenFile) -> None:
    assert not make_access().is_needed(allows_model_control=False)
    assert make_access().is_needed(allows_model_control=True)
    for access in (
        make_access(tokens),
        make_access(rate_limit=1.0),
        make_access(proxies="10.0.0.1"),
        make_access(origins=("*",)),
        make_access(prefix="/x"),
    ):
        assert access.is_needed(allows_model_control=False)
